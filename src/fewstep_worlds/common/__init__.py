"""Shared parts of worlds: autoencoder, denoiser, text encoder, pipeline folder, training, tables."""
