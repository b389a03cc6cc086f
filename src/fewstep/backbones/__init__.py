"""Backbones: what is particular to one family of pretrained pipelines. They know no method."""
