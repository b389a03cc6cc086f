"""Metrics of pictures: each is an identity record, features and a reduction."""
