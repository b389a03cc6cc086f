"""Sets drawn by a teacher from prompts alone: its latents, or its whole trajectories, stored for training."""
