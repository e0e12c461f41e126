"""Compares the ops and the training step with their peers on this machine: `pytest benchmarks`."""
