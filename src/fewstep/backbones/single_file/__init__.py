"""Checkpoints of one file, as ComfyUI and others hold them: what they are, their configs and their weights."""
