"""Preference scorers: differentiable scores of how well people would like a picture for a prompt."""
