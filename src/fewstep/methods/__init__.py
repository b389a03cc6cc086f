"""Objectives: what a student is asked to minimise."""
