"""Prompts, pictures, cached latents. Knows no method."""
