"""Sets that a teacher draws from prompts alone: its latents or its trajectories, stored for training."""
