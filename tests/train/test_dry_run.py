"""What a dry run says, of the world, of a file, of a model without weights, and of what does not fit."""

import re
from types import SimpleNamespace

import pytest
import small_runs as runs
from memory_cases import TEXTS

from geo_r1.models.cost import ModelCost
from geo_r1.models.tiny import build_tiny
from geo_r1.train.__main__ import main
from geo_r1.train.estimate import dry_run, readiness
from geo_r1.train.estimate.memory import estimate
from geo_r1.train.models import without_weights
from geo_r1.train.recipe.load import load_recipe
from geo_r1.train.rl import rollout_engines
from geo_r1.train.state.checkpoint import Checkpoints


@pytest.fixture
def no_weights(tmp_path):
    """A folder with a config, a tokenizer and an image processor."""
    model, tokenizer, image_processor = build_tiny(TEXTS, 0, 64, 2, weights=False)
    for piece in (model.config, tokenizer, image_processor):
        piece.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model.config


def what_it_takes(recipe, num_ranks):
    return dry_run.what_it_takes(recipe, num_ranks)[0]


def recipe_of(tmp_path, *stages, **changes):
    return load_recipe(runs.arguments(tmp_path / "run", *stages, **changes))


def test_a_run_on_the_world(tmp_path, no_weights):
    folder, config = no_weights
    before = runs.files_under(tmp_path)
    recipe = recipe_of(tmp_path, "sft", "grpo", "eval", model__path=folder)
    text = what_it_takes(recipe, 2)
    assert runs.files_under(tmp_path) == before | {"small.toml"}  # the recipe, which the test wrote
    count = ModelCost.of(config).num_parameters
    assert f"qwen2_5_vl, {count:,} parameters" in text
    assert f"sft trains {count:,} (weights), 0 are frozen" in text
    assert "ranks      2, fsdp2, weights in 2 shards; layers compute in float32, checkpointing none" in text
    for line in ("== sft: 5 steps of 4 samples", "== grpo: 5 steps of 2 samples", "== eval: 6 samples"):
        assert line in text
    assert "of 4 completions, each as long as may be" in text and "rollout" in text and "reference" in text


def test_a_file_gives_lengths_epochs_and_operations(tmp_path, no_weights):
    folder, config = no_weights
    data = runs.write_dataset(tmp_path, 6)
    options = {"sft__data": data, "sft__epochs": 2, "sft__freeze": ["vision"]}
    text = what_it_takes(recipe_of(tmp_path, "sft", model__path=folder, **options), 1)
    assert "== sft: 3 steps of 4 samples, 2.00 epochs of 6" in text
    sample = r"a sample: (\d+) tokens of prompt, (\d+) of them of images, and (\d+) of the response"
    prompt, images, response = map(int, re.search(sample, text).groups())
    assert images == 2 + 4  # 56 x 28 and 56 x 56 pixels, 28 x 28 a token
    tokens = int(re.search(r"a step: (\d+) tokens", text)[1])
    assert tokens == pytest.approx(4 * (prompt + response), abs=4)
    flops = ModelCost.of(config).flops(
        prompt, [response], [(1, 2, 4), (1, 4, 4)], backward=True, frozen=("vision",)
    )
    assert float(re.search(r"update ([\d.e-]+)", text)[1]) == pytest.approx(4e-12 * flops, rel=0.05)
    frozen = ModelCost.of(config).parameters["vision"]
    assert f"{frozen:,} are frozen" in text


def test_data_that_is_not_there_is_said(tmp_path, no_weights):
    recipe = recipe_of(tmp_path, "sft", model__path=no_weights[0], sft__data="nowhere.jsonl")
    text = what_it_takes(recipe, 1)
    assert "== sft: its data cannot be read" in text and "nowhere.jsonl does not exist" in text
    assert "assumed: prompts of 2,048 tokens" in text


def test_long_prompts_are_an_error_or_skipped_as_in_a_run(tmp_path, no_weights):
    options = {"model__path": no_weights[0], "data__max_prompt_tokens": 3}
    text = what_it_takes(recipe_of(tmp_path, "sft", **options), 1)
    assert "== sft: cannot run like this" in text
    assert re.search(r"NOT READY:\n    sft: .*the budget is 3\. Raise data\.max_prompt_tokens", text)
    text = what_it_takes(recipe_of(tmp_path, "sft", **options, data__on_overlong="skip"), 1)
    assert "none of the first samples of its data fits" in text


def test_what_does_not_fit_and_what_would_help(tmp_path, no_weights, monkeypatch):
    folder, config = no_weights
    recipe = recipe_of(tmp_path, "grpo", model__path=folder, grpo__data="nowhere.jsonl")
    peak = estimate(recipe, config, 1, "grpo").peak
    monkeypatch.setattr(dry_run.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dry_run, "ASSUMED", peak)
    assert "fits: " in what_it_takes(recipe, 1) and "Instead" not in what_it_takes(recipe, 1)
    monkeypatch.setattr(dry_run, "ASSUMED", peak - 1)
    text = what_it_takes(recipe, 1)
    assert "does not fit: " in text
    found = dict(re.findall(r"^    (.+?): ([\d.]+ [GM]iB(?:, fits)?)$", text, re.MULTILINE))
    full = estimate(dry_run._changed(recipe, {"model.checkpointing": "full"}), config, 1, "grpo").peak
    assert full < peak
    assert found["model.checkpointing = full"] == f"{dry_run.gib(full)}, fits"
    assert {key.split(" = ")[0] for key in found} == {
        "model.checkpointing",
        "parallel.strategy",
        "grpo.optim.optimizer",
        "lora.rank",
        "rollout.max_tokens",
    }


def test_the_tiny_model_is_made_on_the_spot(tmp_path):
    text = what_it_takes(recipe_of(tmp_path, "eval", model__path="tiny"), 1)
    assert "tiny: qwen2_5_vl" in text and "evaluation" in text


def test_an_unknown_model_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    text = what_it_takes(recipe_of(tmp_path, "sft", model__path=tmp_path / "empty"), 1)
    assert re.fullmatch(r"NOT READY:\n    .*empty cannot be loaded.*", text)


def test_what_vllm_takes(tmp_path, no_weights, monkeypatch):
    folder, config = no_weights
    monkeypatch.setattr(dry_run, "_device", lambda: (64 << 20, "a small one"))
    weights = 4 * ModelCost.of(config).num_parameters / 2**20

    def said(**changes):
        changes = {f"rollout__{key}": value for key, value in changes.items()} | {"rollout__engine": "vllm"}
        return what_it_takes(recipe_of(tmp_path, "grpo", model__path=folder, **changes), 2)

    def shares(text):
        [line] = [line for line in text.splitlines() if line.startswith("vLLM")]
        return line.split()[1:]

    text = said(gpu_memory=0.25)
    assert f"sampled by vLLM, whose weights take {weights:.1f} MiB of its 16.0 MiB\n" in text + "\n"
    first, *others = shares(text)
    assert first == "16.00" and {*others} == {"-"}  # it sleeps while the policy learns
    small = said(gpu_memory=0.001)
    assert "too much; raise rollout.gpu_memory or rollout.tensor_parallel_size" in small
    assert {*shares(said(gpu_memory=0.25, max_staleness=1))} == {"16.00"}
    served = said(server_url="http://here:1")
    assert "sampled by vLLM at http://here:1, whose memory is its own" in served


def said(tmp_path, capsys, *stages, **changes):
    """Exit code, standard output and standard error of a dry run."""
    code = main([*runs.arguments(tmp_path / "run", *stages, **changes), "--dry-run"])
    done = capsys.readouterr()
    return code, done.out.splitlines(), done.err


def test_a_recipe_that_can_start_is_ready(tmp_path, no_weights, capsys):
    code, out, err = said(tmp_path, capsys, "sft", "grpo", "eval", model__path=no_weights[0])
    assert (code, out[-1], err) == (0, "READY", "")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"sft__data": "gone.jsonl"}, r"sft\.data: data file gone\.jsonl does not exist"),
        ({"eval__data": "gone.parquet", "eval__every": 2}, r"gone\.parquet does not exist"),
        ({"model__path": "./nowhere"}, r"model folder \./nowhere does not exist"),
        ({"rewards__functions": ["accuracy", "acuracy"]}, "acuracy"),
        ({"rollout__engine": "vllm"}, r"rollout\.engine = vllm needs vLLM: pip install"),
        ({"rollout__cuda_graphs": True}, "cuda_graphs needs a GPU"),
        ({"log__wandb": True}, r"log\.wandb needs wandb, which is not installed: pip install"),
        ({"sft__freeze": ["vision", "projector", "text"]}, "leaves nothing to train"),
        ({"run__dir": "{}/small.toml/run"}, r"small\.toml is no folder"),
    ],
)
def test_what_is_missing_is_said_with_exit_code_2(
    changes, missing, tmp_path, no_weights, capsys, monkeypatch
):
    monkeypatch.setattr(dry_run.torch.cuda, "is_available", lambda: False)
    for module in (readiness, rollout_engines):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("vllm", "wandb") else name)
    changes = {
        key: str(tmp_path / "small.toml/run") if key == "run__dir" else value
        for key, value in changes.items()
    }
    arguments = runs.arguments(tmp_path / "run", "sft", "grpo", **{"model__path": no_weights[0]} | changes)
    if "run__dir" in changes:
        arguments.append(f"--run.dir={changes['run__dir']}")
    assert main([*arguments, "--dry-run"]) == 2
    done = capsys.readouterr()
    ending = done.out.splitlines()[done.out.splitlines().index("NOT READY:") + 1 :]
    assert len(ending) == 1 and re.search(missing, ending[0])
    assert done.err == f"geo_r1: not ready: {ending[0].strip()}\n"


def test_all_that_is_missing_is_listed(tmp_path, capsys):
    changes = {"sft__data": "gone.jsonl", "model__path": "./nowhere", "rewards__functions": ["acuracy"]}
    code, out, err = said(tmp_path, capsys, "sft", **changes)
    assert code == 2 and "; 1 more above" in err
    assert len(out) == 3 and "nowhere" in out[1] and "acuracy" in out[2]  # without a model, data are not read


def test_wall_time_comes_from_recorded_steps(tmp_path, no_weights):
    recipe = recipe_of(tmp_path, "sft", "grpo", model__path=no_weights[0], grpo__steps=100)
    rows = [
        {"stage": "grpo", "step": step, "time/step": seconds} for step, seconds in ((1, 90), (2, 60), (3, 30))
    ]
    (tmp_path / "run").mkdir()
    runs.write_rows(tmp_path / "run" / "metrics.jsonl", rows)
    text = what_it_takes(recipe, 1)
    assert "grpo: about 1:37:00 for 97 of 100 steps, 60 s each (median of 3 in" in text
    assert re.search("time +sft: no basis, since .*run has no step of it", text)


@pytest.mark.parametrize(("free", "ready"), [(10**15, True), (10, False)])
def test_the_disk_is_compared(free, ready, tmp_path, no_weights, monkeypatch):
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    text, missing = dry_run.what_it_takes(recipe_of(tmp_path, "sft", model__path=no_weights[0]), 1)
    assert text.endswith("READY") == ready and bool(missing) != ready
    assert f"free in {tmp_path}: " in text


@pytest.mark.parametrize("changes", [{}, {"lora__rank": 32}, {"grpo__reference__sync_steps": 1}])
def test_a_checkpoint_and_a_model_are_as_large_as_said(changes, tmp_path):
    """Nearly: each tensor of a checkpoint has 2 KB of its own, which counts in a tiny model."""
    if "lora__rank" in changes:
        pytest.importorskip("peft")
    kept = {"grpo__save_every": 1, "grpo__steps": 2} | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "finish", Checkpoints.wait)
        run_dir = runs.train(tmp_path / "run", "grpo", **kept)
    recipe = recipe_of(tmp_path, "grpo", **kept)
    checkpoint, model = readiness.sizes(recipe, without_weights(recipe)[0], "grpo")
    written = sum(file.stat().st_size for file in (run_dir / "checkpoints/grpo-000002").rglob("*.distcp"))
    assert checkpoint == pytest.approx(written, rel=0.25)
    assert model == pytest.approx((run_dir / "models/grpo/model.safetensors").stat().st_size, rel=0.02)
