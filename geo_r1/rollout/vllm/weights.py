"""A policy's weights on their way into a vLLM worker: compared with the model's own, then loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from geo_r1.models.skeleton import empty_model


def expected_weights(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's weights, tied ones once."""
    model = empty_model(type(config).from_dict(config.to_dict()), torch.float32)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class CheckedWeights:
    """Weights for an engine; those that do not fit are left out and named at the end.

    Args:
        tensors: names and values.
        expected: names and shapes, each wanted once.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, torch.Size]) -> None:
        self._tensors, self._expected = tensors, expected
        self._left = set(expected)
        self._wrong: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            if name not in self._left:
                why = "came twice" if name in self._expected else "is no weight of this model"
                self._wrong.append(f"{name} {why}")
                continue
            self._left.remove(name)
            if tensor.shape == self._expected[name]:
                yield name, tensor
            else:
                shapes = f"{list(tensor.shape)}, not {list(self._expected[name])}"
                self._wrong.append(f"{name} has shape {shapes}")

    def check(self) -> None:
        """Raise ValueError if weights were missing or did not fit, and name them; call it after the last."""
        wrong = self._wrong + [f"{name} is missing" for name in sorted(self._left)]
        if wrong:
            named = "; ".join(wrong[:3])
            raise ValueError(f"{len(wrong)} weights do not fit the engine's model: {named}")


def load_into(worker: Any, tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, torch.Size]) -> None:
    """Replace the weights of one of vLLM's workers; runs in that worker.

    vLLM only warns about weights of its own that nobody sent, and only the model's `load_weights` knows which
    ones came.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; names it.
    """
    # At every load it warns of layers that have no weights.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    model = worker.model_runner.get_model()
    # Without a checkpoint vLLM draws random values for everything that a checkpoint could hold, buffers too.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name for name, _ in model.named_parameters()} | set(model.state_dict()) - tied
    wanted = {name for name in wanted if "._" not in name}  # vLLM sets the scales of a quantised cache itself
    loaded: set[str] = set()
    load_weights = model.load_weights

    def counted(given: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded.update(load_weights(given))
        return loaded

    weights = CheckedWeights(tensors, expected)
    model.load_weights = counted
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    language_model = model.get_language_model()
    if language_model.config.tie_word_embeddings:  # on a CPU the head has a packed copy, now out of date
        language_model.lm_head.quant_method.process_weights_after_loading(language_model.lm_head)
    weights.check()
    if not_loaded := sorted(wanted - loaded):
        raise ValueError(f"vLLM has {len(not_loaded)} weights that nobody sent, such as {not_loaded[0]}")
