"""A Flower app with its own network and data."""
