"""Kind robust.evaluate: a classifier under a list of attacks."""
