"""The trainer: `torchrun -m geo_r1.train [recipe.toml] [--section.key value ...]`."""
