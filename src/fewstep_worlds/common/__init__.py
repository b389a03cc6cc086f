"""What worlds share: autoencoder, denoiser, text encoder, pipeline folder, training, tables."""
