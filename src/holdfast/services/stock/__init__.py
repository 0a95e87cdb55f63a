"""Stock: SKUs, levels per warehouse, work orders that hold units for orders, and the ledger of every movement."""
