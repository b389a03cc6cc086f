"""Preference scorers: differentiable numbers that say how well people would like a picture for a prompt."""
