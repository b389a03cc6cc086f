"""Backbones: what is particular to one family of pretrained pipelines. Independent of methods."""
