"""Payments: payment orders, notices of providers, refunds; captured money is never lost and never kept unowed."""
