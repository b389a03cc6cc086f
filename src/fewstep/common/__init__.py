"""Modules that every other package uses."""
