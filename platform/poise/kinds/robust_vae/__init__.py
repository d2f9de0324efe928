"""Kind robust.vae: training of a conditional variational autoencoder."""
