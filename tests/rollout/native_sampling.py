"""The native sampler with its arguments in short."""

from geo_r1.rollout import SamplingConfig, generate


def sample_natively(vlm, prompts, num_completions, seed, ends, *, streams=None, **options):
    """Completions of prompts whose streams are `seed/index`, unless they are named."""
    other = {name: options.pop(name) for name in ("max_tokens", "cuda_graphs") if name in options}
    return generate(
        vlm,
        prompts,
        num_completions,
        sampling=SamplingConfig(**options),
        eos_token_id=ends,
        streams=streams or [f"{seed}/{i}" for i in range(len(prompts))],
        **other,
    )
