"""Kind robust.manifold: attacks on and off the data manifold."""
