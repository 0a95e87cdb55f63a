"""The messaging room's rules: policies, topology, codec, deliveries."""
