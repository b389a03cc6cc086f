"""Distillation losses and their recipes."""
