"""Cross-view questions from raw imagery with coordinates."""
