"""Groups of completions: sampling, scoring, and how far the sampler is from the policy."""
