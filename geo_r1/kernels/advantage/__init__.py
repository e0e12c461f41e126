"""Group-relative advantages."""
