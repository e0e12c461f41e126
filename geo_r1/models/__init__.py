"""Run transformers' vision-language models on packed batches."""

from geo_r1.models.loading import load_model
from geo_r1.models.packed import EncodedPrompt, PackedBatch, pack
from geo_r1.models.qwen_vl import PackedVLM

__all__ = ["EncodedPrompt", "PackedBatch", "PackedVLM", "load_model", "pack"]
