"""Chains of thought: a teacher writes them, and a fact check sorts them."""
