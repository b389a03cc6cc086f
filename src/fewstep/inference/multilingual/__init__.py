"""Prompts of any language: an adapter from multilingual sentence vectors to a teacher's token states."""
