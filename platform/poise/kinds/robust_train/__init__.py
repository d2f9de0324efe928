"""Kind robust.train: adversarial training of an image classifier."""
