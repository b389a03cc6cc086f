"""Metrics that papers print, each on the network that it is defined by."""
