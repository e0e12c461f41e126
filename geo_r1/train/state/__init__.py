"""Checkpoints, and how they are read and written in shards."""
