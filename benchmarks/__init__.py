"""How the ops and the training step compare with their peers, on the machine at hand: `pytest benchmarks`."""
