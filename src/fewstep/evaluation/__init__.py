"""Measuring pictures: a metric is an identity record, features and a reduction."""
