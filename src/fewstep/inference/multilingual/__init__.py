"""Prompts of any language: a multilingual sentence vector, and an adapter from it to a teacher's token states."""
