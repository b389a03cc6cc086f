"""LPIPS on latents: a network trained for a teacher, from its own latents, to match a distance between pictures."""
