"""Worlds to train and measure few-step models in: pictures, prompts and exact facts, built on `fewstep`."""
