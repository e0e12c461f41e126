"""Chains of thought: a teacher that writes them, and the check of what they say."""
