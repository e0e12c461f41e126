"""Two ranks with prompts of their own sample with an engine each or one that they share; for torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_lab import END, make_lab

from geo_r1.rollout import SamplingConfig
from geo_r1.rollout.vllm.in_process import VLLMEngine

NUM_PROMPTS = (3, 5)


def main(folder: Path, tensor_parallel_size: int) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    lab = make_lab(folder / f"model{rank}")
    engine = VLLMEngine(
        lab.folder,
        end_token_ids=[END],
        vision_token_ids=lab.vlm.vision_token_ids,
        dtype=torch.float32,
        max_model_len=320,
        kv_cache_bytes=1 << 26,
        tensor_parallel_size=tensor_parallel_size,
    )
    for seed in (1, 2):
        engine.load(lab.weights(seed).items())
        prompts = lab.prompts[rank : rank + NUM_PROMPTS[rank]]
        streams = [f"7/{rank + index}" for index in range(len(prompts))]
        groups = engine.sample(prompts, 2, SamplingConfig(max_new_tokens=20), streams)
        lab.assert_logp(prompts, groups)
        said: list = [None, None]
        dist.all_gather_object(said, [[c.token_ids for c in group] for group in groups])
        assert said[0][1:] == said[1][:2]  # the same prompts and streams
    engine.close()
    dist.barrier()  # the trainer's own group is still there
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
