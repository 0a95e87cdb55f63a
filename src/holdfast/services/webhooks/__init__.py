"""Outgoing webhooks: events posted to other programs by the Standard Webhooks rules."""
