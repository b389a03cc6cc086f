"""Prompts, pictures and cached latents, independent of the method."""
