"""Benchmarks of geospatial reasoning and their scorers."""
