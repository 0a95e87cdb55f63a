"""Orders: placed against held stock, then paid, cancelled or closed, each transition once and logged."""
