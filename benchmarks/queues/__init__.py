"""Message queues under one load: holdfast, its peers, and the bare drivers."""
