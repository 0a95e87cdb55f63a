"""holdfast: reliable messaging for Python, and an order engine on top of it."""
