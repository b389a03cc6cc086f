"""A perceptual distance between latents, taught by pixels: trained for a teacher from its own latents alone."""
