"""What tests of the trainer's options share: runs that stop on the way, weights by part, rewards to name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import forked_ranks
import pytest
import small_runs as runs
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.data import PromptEncoder, Sample
from geo_r1.models import EncodedPrompt
from geo_r1.train.__main__ import main
from geo_r1.train.context import RunContext
from geo_r1.train.report.log import Log

SAME = 1e-4  # relative, of what is added up in another order
# How the ranks share the work is not what the work is.
OF_RANKS = ("num_micro_batches", "plan/", "tokens/repeated_prompt")


def equal_rewards(completion_ids, **_):
    return [0.5] * len(completion_ids)


def exported(run_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    return weights_in(run_dir / "models" / stage)


def started_from() -> dict[str, torch.Tensor]:
    return weights_in(runs.SMALL["model.path"])


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """As plain transformers reads them, by the names that they have in a model."""
    return {
        name: p.detach() for name, p in AutoModelForImageTextToText.from_pretrained(folder).named_parameters()
    }


def as_transformers_reads(folder: Path, sample: Sample) -> tuple[EncodedPrompt, list[int], torch.Tensor]:
    """What transformers makes of a sample with the model and the tokenizer of an exported folder.

    Returns:
        Its prompt, its response of R tokens, and the logits [R, V] that predict these.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    encoder = PromptEncoder(
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        model.config.image_token_id,
    )
    prompt, response = encoder.encode(sample), encoder.encode_response(sample.response)
    token_ids = torch.tensor([[*prompt.token_ids, *response]])
    with torch.no_grad():
        logits_TV = model(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            mm_token_type_ids=(token_ids == model.config.image_token_id).int(),
            pixel_values=prompt.pixel_values,
            image_grid_thw=torch.tensor(prompt.image_grids),
        ).logits[0]
    return prompt, response, logits_TV[len(prompt.token_ids) - 1 : -1]


def part_of(name: str) -> str:
    """Which part of the model a weight belongs to, by its name."""
    if not name.startswith("model.visual."):
        return "text"
    return "projector" if name.startswith("model.visual.merger.") else "vision"


def changed(run_dir: Path, stage: str) -> set[str]:
    """Names of the weights that are not, bit for bit, what the run started from."""
    before, after = started_from(), exported(run_dir, stage)
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def stopped(run_dir: Path, stage: str, step: int, by: int = signal.SIGTERM, **changes) -> Path:
    """A run that is asked to stop at a step, and does so with a checkpoint."""
    write = Log.write

    def write_and_stop(self, stage, number, metrics):
        write(self, stage, number, metrics)
        if number == step:
            os.kill(os.getpid(), by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", write_and_stop)
        assert main(runs.arguments(run_dir, stage, **changes)) == 0
    assert not (run_dir / "models").exists()
    assert (run_dir / "checkpoints" / f"{stage}-{step:06d}").is_dir()
    return run_dir


def on_two_ranks(run_dir: Path, *stages: str, **changes) -> Path:
    """A run on two ranks, by fsdp2; it has to succeed."""
    changes |= {"parallel__strategy": "fsdp2"}
    ended = forked_ranks.run(runs.arguments(run_dir, *stages, **changes), 2)
    assert ended.codes == [0, 0], "\n".join(ended.stderr)
    return run_dir


def assert_goes_on_bit_by_bit(whole: Path, stage: str, step: int, **changes) -> None:
    """The run that was stopped after a step and went on is, bit for bit, the one that was not."""
    run_dir = stopped(whole.with_name("stopped"), stage, step, **changes)
    assert_same_run(runs.train(run_dir, stage, **changes), whole, stage)


def assert_same_run(found: Path, expected: Path, stage: str) -> None:
    assert runs.metrics(found, stage) == runs.metrics(expected, stage)
    assert runs.weights(found, stage) == runs.weights(expected, stage)


def assert_same_figures(found: Path, expected: Path, stage: str, tolerance: float = SAME) -> None:
    """Every figure of every step, but for those of how ranks share the work."""
    rows, others = runs.metrics(found, stage), runs.metrics(expected, stage)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"stage"}:
            if not name.startswith(OF_RANKS):
                assert row[name] == pytest.approx(other[name], rel=tolerance, abs=1e-2 * tolerance), name


def watch_exports(monkeypatch) -> list:
    """The policies that are exported from now on."""
    policies, export = [], RunContext.export
    monkeypatch.setattr(
        RunContext,
        "export",
        lambda self, folder, policy: (policies.append(policy), export(self, folder, policy)),
    )
    return policies
