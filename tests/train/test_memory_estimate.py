"""Memory by calculation, against what a policy holds and a forward saves."""

from concurrent.futures import ProcessPoolExecutor

import memory_cases as cases
import pytest
import torch
from saved_states import ALONE, PROCESSES

import geo_r1.models.attention
import geo_r1.models.qwen_vl
from geo_r1.errors import UserError
from geo_r1.models import PackedVLM
from geo_r1.models.lora import add_lora
from geo_r1.models.tiny import build_tiny
from geo_r1.train.estimate.activations import Numbers, rows_of
from geo_r1.train.estimate.memory import Load, estimate
from geo_r1.train.estimate.weights import entries, weights_of
from geo_r1.train.recipe.sections import Recipe

EIGHT_BIT = {"sft": {"steps": 1, "optim": {"optimizer": "adamw_8bit"}}}
ADAPTERS = {"rank": 3, "vision": True, "targets": ("q_proj", "down_proj")}
CASES = {
    "tiny": ("tiny", {}),
    "20 million": ("20 million", {}),
    "8 bit": ("20 million", EIGHT_BIT),
    "bfloat16": (
        "tiny",
        {"sft": {"steps": 1, "optim": {"optimizer": "adamw_bf16"}}, "model": {"dtype": "bfloat16"}},
    ),
    "autocast": ("tiny", {"model": {"dtype": "bfloat16"}}),
    "frozen": ("tiny", {"sft": {"steps": 1, "freeze": ("vision", "projector")}}),
    "adapters": ("tiny", {"lora": ADAPTERS}),
}


def needs(recipe: Recipe) -> None:
    if recipe.sft.optim.optimizer != "adamw":
        pytest.importorskip("torchao")
    if recipe.lora.rank:
        pytest.importorskip("peft")


@pytest.mark.parametrize("case", CASES)
def test_a_rank_alone_holds_that_much(case):
    size, options = CASES[case]
    recipe = Recipe(**options)
    needs(recipe)
    own = found(size, **options)
    parts = {**own.held, "gradients": own.phases["update"]["gradients"]}
    assert parts == pytest.approx(cases.bytes_held(recipe, size, ALONE), rel=0.01)
    assert parts["weights"] > 0 and parts["optimizer state"] > 0


def test_shards_are_that_large(tmp_path):
    """Sizes that two ranks do not divide are padded, such as an adapter of three rows."""
    pytest.importorskip("peft")
    pytest.importorskip("torchao")
    options = {"8 bit": EIGHT_BIT, "adapters": {"lora": ADAPTERS, "model": {"dtype": "bfloat16"}}}
    with ProcessPoolExecutor(2, mp_context=PROCESSES) as pool:
        for name, values in options.items():
            recipe, size = Recipe(**values), "rows of blocks" if name == "8 bit" else "tiny"
            store = str(tmp_path / name)
            jobs = [pool.submit(cases.bytes_on_a_rank, rank, 2, store, recipe, size) for rank in range(2)]
            first, second = (job.result() for job in jobs)
            own = found(size, 2, **values)
            parts = {**own.held, "gradients": own.phases["update"]["gradients"]}
            assert parts == pytest.approx(first, rel=0.01)
            assert all(second[part] == first[part] for part in ("weights", "gradients"))
            assert second["optimizer state"] <= first["optimizer state"]


def test_adapters_are_those_that_are_added():
    pytest.importorskip("peft")
    recipe = Recipe(lora=ADAPTERS)
    model, *_ = build_tiny(cases.TEXTS, 0, 64, 2, weights=False)
    own = {weight.name: weight for weight in weights_of(model.config, (), recipe.lora)}
    add_lora(model, **recipe.lora.model_dump())
    names = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    assert {name: (weight.shape, weight.trained) for name, weight in own.items()} == {
        name: (tuple(p.shape), p.requires_grad) for name, p in names.items()
    }


class Keep(torch.autograd.Function):
    """What a GPU's attention keeps. The reference on a CPU copies each group's keys, as no kernel does."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        return out


def saved_bytes(vlm: PackedVLM, batch) -> int:
    """Bytes that a forward saves, without weights and the copies that autocast makes of them."""
    weights = list(vlm.model.parameters())
    own = {tensor.untyped_storage()._cdata for tensor in (*weights, *vlm.model.buffers())}
    copies = {shape for p in weights if p.ndim > 1 for shape in (p.shape, p.shape[::-1])}
    casts = vlm.compute_dtype != vlm.model.dtype
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not (casts and tensor.shape in copies):
            seen[storage._cdata] = storage.nbytes(), tensor  # held, so that its memory is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vlm.loss_rows(batch)
    return sum(count for count, _ in seen.values())


@pytest.mark.parametrize("size", ["tiny", "20 million"])
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_what_is_kept_for_backward(size, kind, dtypes, monkeypatch):
    def attend(q, k, v, layout, **_):
        return Keep.apply(q, k, v)

    for module in (geo_r1.models.attention, geo_r1.models.qwen_vl):
        monkeypatch.setattr(module, "packed_attention", attend)
    wide, narrow = (getattr(torch, name) for name in dtypes)
    hidden, layers = cases.WIDTHS[size]
    model, *_ = build_tiny(cases.TEXTS, 0, hidden, layers)
    vlm = PackedVLM(model.to(wide), narrow, liger=False)
    vlm.model.train()
    vlm.checkpoint_layers(kind)
    batch = cases.batch_of(model.config, 18, 20, [60, 60, 40, 75])
    numbers = Numbers(wide.itemsize, narrow.itemsize, casts=wide != narrow)
    text, tower = rows_of(model.config, numbers, kind)
    of_text = text.kept * len(batch.token_ids)
    of_tower = tower.kept * len(batch.pixel_values) // model.config.vision_config.spatial_merge_size**2
    assert of_text + of_tower == pytest.approx(saved_bytes(vlm, batch), rel=0.1)
    vlm.freeze(("vision", "projector"))
    assert of_text == pytest.approx(saved_bytes(vlm, batch), rel=0.1)


def found(size: str, num_ranks: int = 1, stage: str = "sft", load=None, **options):
    return estimate(Recipe(**options), cases.config_of(size), num_ranks, stage, load)


def peaks(num_ranks: int, **options) -> dict[str, int]:
    options = {"model": {"dtype": "bfloat16", "checkpointing": "full"}, **options}
    return found("20 million", num_ranks, "grpo", **options).totals


def test_sharding_offloading_and_adapters_leave_less_on_a_rank():
    alone, shards = peaks(1), peaks(8)
    assert shards["update"] < alone["update"] and shards.keys() == {"rollout", "update"}
    offloaded = peaks(8, parallel={"cpu_offload": True})
    assert all(offloaded[phase] < shards[phase] for phase in shards)
    assert max(peaks(8, lora={"rank": 4}).values()) < max(shards.values())
    whole = peaks(8, parallel={"strategy": "ddp"})
    assert whole.keys() == {"rollout", "update"} and whole["update"] == alone["update"]
    pairs = peaks(8, parallel={"shard_size": 2})
    assert shards["update"] < pairs["update"] < whole["update"]


def test_zero_holds_narrow_weights_and_wide_masters():
    count = entries(weights_of(cases.config_of("20 million"), (), Recipe().lora))
    two, three = (
        found(
            "20 million", 4, model={"dtype": "bfloat16"}, parallel={"strategy": "deepspeed", "zero_stage": n}
        )
        for n in (2, 3)
    )
    assert two.held["bucket of gradients"] == 2 * 500_000_000
    assert two.held["weights"] == 2 * count
    assert two.held["weights in float32"] == pytest.approx(count, rel=0.01)
    assert two.held["optimizer state"] == pytest.approx(2 * count, rel=0.01)
    assert three.held["weights"] == pytest.approx(count / 2, rel=0.01)
    with pytest.raises(UserError, match="torchao's optimisers cannot update: use adamw"):
        found("20 million", 4, parallel={"strategy": "deepspeed"}, **EIGHT_BIT)


def test_a_reference_model_is_held_if_there_is_a_kl_and_no_adapters():
    loss = {"steps": 1, "loss": {"beta": 0.1}}
    count = entries(weights_of(cases.config_of("tiny"), (), Recipe().lora))
    kl, adapters = (found("tiny", 1, "grpo", grpo=loss, lora={"rank": rank}) for rank in (0, 2))
    assert kl.held["reference model"] == 4 * count and "reference" in kl.phases
    assert "reference model" not in adapters.held and "reference" in adapters.phases
    assert "reference" not in found("tiny", 1, "grpo").phases


def test_less_work_takes_less():
    def kept(load=None, **model):
        return found("tiny", load=load, model=model).phases["update"]["activations kept"]

    full = kept()
    load = Load(step_tokens=Recipe().sft.optim.max_tokens // 4)
    assert kept(load) == pytest.approx(full / 4, rel=1e-3)
    by_kind = [kept(checkpointing=kind) for kind in ("none", "selective", "full")]
    assert by_kind == sorted(by_kind, reverse=True) and by_kind[0] == full
    assert found("tiny", model={"offload_activations": True}).host["activations kept"] == full


def test_a_shard_size_that_does_not_divide_the_ranks_is_an_error():
    with pytest.raises(UserError, match="shard_size = 3 does not divide the 4 ranks"):
        found("tiny", 4, parallel={"shard_size": 3})
