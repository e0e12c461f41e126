import itertools
from dataclasses import replace

import pytest
import torch
from losses import full_logits, loss_case, written_out

import geo_r1.kernels.loss.chunks as chunks
from geo_r1.kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, token_weights

EXACT = {"rtol": 1e-11, "atol": 1e-13}

# Every value of every option, each with every policy and level.
OPTIONS = [
    {},
    {"epsilon": 0.1, "epsilon_high": 0.3},
    {"entropy_coef": 0.3, "temperature": 0.7},
    {"entropy_coef": -0.1, "beta": 0.2},
    {"beta": 0.04, "kl_estimator": "k1"},
    {"beta": 0.04, "kl_estimator": "k2", "temperature": 1.3},
    {"beta": 0.04, "kl_estimator": "k3", "entropy_coef": 0.01, "epsilon_high": 0.28},
    {"delta": 1.5},
    {"delta": 1.1, "epsilon_high": 0.4, "beta": 0.1},  # delta inside the clip's own range
    {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0},
]


# What `in_kernels` leaves to plain torch: each with the levels that it goes with.
OTHERS = [
    {"beta": 0.1, "use_bias_correction_kl": True},
    {"beta": 0.1, "use_bias_correction_kl": True, "kl_estimator": "k3+", "policy": "sapo"},
    {
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "kl_estimator": "k1",
        "policy": "cispo",
        "epsilon_high": 1.1,
    },
    {"beta": 0.1, "kl_estimator": "abs"},
    {"beta": 0.1, "kl_estimator": "k1+"},
    {"beta": 0.1, "kl_estimator": "k3+", "entropy_coef": 0.1},
    {"beta": 0.1, "kl_estimator": "low_var_kl"},
    {"policy": "cispo", "epsilon_high": 1.1, "cispo_low": 0.9},
    {"top_entropy_quantile": 0.4, "entropy_coef": 0.2, "beta": 0.1},
    {"off_policy_mask_threshold": 0.05, "entropy_coef": 0.2},
    {"off_policy_mask_threshold": 0.01, "top_entropy_quantile": 0.7, "policy": "sapo"},
]
OF_ONE_LEVEL = [
    {"policy": "vespo"},
    {"policy": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5, "beta": 0.1, "entropy_coef": 0.1},
    {"policy": "vespo", "beta": 0.1, "use_bias_correction_kl": True, "off_policy_mask_threshold": 0.05},
    {"policy": "geo_mean", "epsilon": 0.1, "epsilon_high": 0.3},
    {"policy": "geo_mean", "beta": 0.1, "use_bias_correction_kl": True, "top_entropy_quantile": 0.6},
]


def configs():
    for policy, level, options in itertools.product(
        ("clip", "cispo", "sapo"), ("token", "sequence"), OPTIONS
    ):
        if "delta" in options and policy != "clip":
            continue
        if "sapo_temperature_pos" in options and policy != "sapo":
            continue
        options = ({"epsilon_high": 1.1} if policy == "cispo" else {}) | options
        yield GRPOLossConfig(policy=policy, importance_sampling_level=level, **options)


def other_configs():
    for level, options in itertools.product(("token", "sequence", "sequence_token"), OTHERS):
        yield GRPOLossConfig(importance_sampling_level=level, **options)
    for options in ({"delta": 1.5}, {"policy": "sapo"}, {"policy": "cispo", "epsilon_high": 1.1}):
        yield GRPOLossConfig(importance_sampling_level="sequence_token", **options)
    for options in OF_ONE_LEVEL:
        level = "token" if options["policy"] == "vespo" else "sequence"
        yield GRPOLossConfig(importance_sampling_level=level, **options)


@pytest.mark.parametrize(
    "config", [*configs(), *other_configs()], ids=lambda c: f"{c.policy}-{c.importance_sampling_level}"
)
def test_three_ways_agree(config, monkeypatch):
    """Fused in chunks == full logits == the formula written out: loss, gradients and reports, in float64."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 4 * 37 * 16)  # chunks of four rows
    whole = loss_case(19, 37)
    for with_old, with_ref, with_importance in itertools.product((True, False), repeat=3):
        if config.beta and not with_ref:
            continue
        case = replace(
            whole,
            old_logp_R=whole.old_logp_R if with_old else None,
            ref_logp_R=whole.ref_logp_R if with_ref else None,
            importance_weight_R=whole.importance_weight_R if with_importance else None,
            entropy_weight_R=whole.advantage_R.abs() if with_old and config.entropy_coef else None,
        )
        truth_case = case.leaves()
        loss, report = written_out(full_logits(truth_case), truth_case, config)
        truth = torch.autograd.grad(loss, (truth_case.hidden_RC, truth_case.lm_head_VC))
        for fused in (False, True):
            leaves = case.leaves()
            inputs = (leaves.hidden_RC, leaves.lm_head_VC) if fused else (full_logits(leaves),)
            out = (linear_grpo_loss if fused else grpo_loss)(*inputs, **case.rows(), config=config)
            torch.testing.assert_close(out.loss, loss, **EXACT)
            grads = torch.autograd.grad(out.loss * 3, (leaves.hidden_RC, leaves.lm_head_VC))
            for got, expected in zip(grads, truth, strict=True):
                torch.testing.assert_close(got, 3 * expected, **EXACT)
            for name, expected in report.items():
                got = getattr(out, f"{name}_R")
                assert not got.requires_grad
                torch.testing.assert_close(got, expected, **EXACT)


def test_the_case_reaches_both_clips():
    case = loss_case(19, 37)
    out = grpo_loss(full_logits(case), **case.rows())
    assert out.clipped_R.any() and not out.clipped_R.all()
    up = out.ratio_R > 1
    assert (out.clipped_R & up).any() and (out.clipped_R & ~up).any()


@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_give_finite_gradients_where_a_bound_holds(policy, level):
    logits = torch.zeros(4, 11, requires_grad=True)
    target = torch.arange(4)
    old = torch.tensor([-200.0, 200.0, 200.0, -200.0]) - torch.tensor(11.0).log()  # ratios e^±200
    advantage = torch.tensor([1.0, -1.0, 1.0, 0.0])
    config = GRPOLossConfig(policy=policy, importance_sampling_level=level, epsilon_high=2.0)
    out = grpo_loss(
        logits, target, advantage, torch.ones(4), old_logp_R=old, sequence_R=target, config=config
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert out.ratio_R.tolist() == [float("inf"), 0.0, 0.0, float("inf")]
    if policy == "clip":
        assert out.loss.item() == pytest.approx(-3.0 + 0.8)
        assert not grad.any()  # A > 0 above and A < 0 below are clipped; the third ratio is 0
        assert out.clipped_R.tolist() == [True, True, False, False]
    bounded = replace(config, delta=4.0) if policy == "clip" else config
    out = grpo_loss(
        logits, target, -advantage, torch.ones(4), old_logp_R=old, sequence_R=target, config=bounded
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert out.loss.isfinite() and grad.isfinite().all()


def test_on_policy_keeps_the_gradient_of_the_ratio():
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    out = grpo_loss(logits, torch.tensor([0]), torch.tensor([2.0]), torch.tensor([1.0]))
    assert out.loss.item() == -2.0 and out.ratio_R.item() == 1.0
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad.tolist() == [[-1.0, 1.0]]  # -A (onehot - p)


def test_tokens_that_cannot_be_drawn():
    """-inf logits have probability 0, entropy 0 and gradient 0."""
    logits = torch.tensor([[1.0, 2.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    arguments = (torch.tensor([1]), torch.tensor([1.0]), torch.tensor([1.0]))
    config = GRPOLossConfig(entropy_coef=0.5)
    out = grpo_loss(logits, *arguments, config=config)
    (grad,) = torch.autograd.grad(out.loss, logits)
    short = logits.detach()[:, :2].requires_grad_()
    expected = grpo_loss(short, *arguments, config=config)
    torch.testing.assert_close(out.loss, expected.loss, **EXACT)
    torch.testing.assert_close(grad[:, :2], torch.autograd.grad(expected.loss, short)[0], **EXACT)
    assert grad[0, 2] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "ppo"}, "policy: expected one of clip, cispo, sapo, vespo, geo_mean, got 'ppo'"),
        ({"importance_sampling_level": "word"}, "got 'word'"),
        ({"kl_estimator": "k4"}, "got 'k4'"),
        ({"epsilon": -0.1}, "epsilon: .* got -0.1"),
        ({"epsilon_high": float("nan")}, "epsilon_high: .* got nan"),
        ({"beta": float("inf")}, "beta: .* got inf"),
        ({"delta": 0.0}, "delta: .* got 0.0"),
        ({"temperature": 0.0}, "temperature: .* got 0.0"),
        ({"entropy_coef": float("nan")}, "entropy_coef"),
        ({"policy": "cispo"}, "needs epsilon_high"),
        ({"policy": "sapo", "delta": 2.0}, "delta=2.0 goes with policy='clip' only"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLossConfig(**options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_R": torch.zeros(5, dtype=torch.int32)},
            r"target_R: expected \[5\] int64, got \[5\] torch.int32",
        ),
        ({"target_R": torch.tensor([0, 1, 11, 0, 0])}, r"values in \[0, 11\), got 11 at row 2"),
        ({"advantage_R": torch.zeros(4)}, r"advantage_R: expected \[5\] floating, got \[4\]"),
        ({"token_weight_R": torch.zeros(5, 1)}, r"token_weight_R: .* got \[5, 1\]"),
        ({"old_logp_R": torch.zeros(5, dtype=torch.int64)}, "old_logp_R: .* torch.int64"),
        ({"ref_logp_R": torch.zeros(5, device="meta")}, "ref_logp_R: expected on cpu, got meta"),
        ({"sequence_R": torch.zeros(5)}, r"sequence_R: expected \[5\] int64"),
        (
            {"sequence_R": None, "config": GRPOLossConfig(importance_sampling_level="sequence")},
            "sequence_R, got None",
        ),
        ({"ref_logp_R": None, "config": GRPOLossConfig(beta=0.1)}, "beta=0.1 needs ref_logp_R"),
        ({"impl": "flash"}, "grpo_loss: impl='flash' cannot run here"),
    ],
)
def test_mistakes_are_named(fused, change, message):
    case = loss_case(5, 11)
    inputs = (case.hidden_RC, case.lm_head_VC) if fused else (full_logits(case),)
    with pytest.raises(ValueError, match=message):
        (linear_grpo_loss if fused else grpo_loss)(*inputs, **case.rows() | change)


WEIGHTS = {  # of a token, from its completion's length, sequences, sequences with tokens, and tokens
    "grpo": lambda length, n, full, tokens: 1 / length / n,
    "sapo": lambda length, n, full, tokens: 1 / length / n,
    "bnpo": lambda length, n, full, tokens: 1 / tokens,
    "dapo": lambda length, n, full, tokens: 1 / tokens,
    "cispo": lambda length, n, full, tokens: 1 / tokens,
    "vespo": lambda length, n, full, tokens: 1 / tokens,
    "luspo": lambda length, n, full, tokens: 1 / n,
    "dr_grpo": lambda length, n, full, tokens: 1 / (n * 16),
    "token-mean": lambda length, n, full, tokens: 1 / tokens,
    "seq-mean-token-sum": lambda length, n, full, tokens: 1 / full,
    "seq-mean-token-mean": lambda length, n, full, tokens: 1 / length / full,
    "seq-mean-token-sum-norm": lambda length, n, full, tokens: 1 / 16,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_items", [None, 21])
@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_token_weights_equal_a_loop(loss_type, num_items, masked):
    mask = [[1, 0, 1], [], [0], [1, 1, 0, 1]] if masked else [[1] * 3, [], [1], [1] * 4]
    n, full = (num_items or count for count in (4, sum(map(any, mask))))
    tokens = num_items or sum(map(sum, mask))
    expected = [
        WEIGHTS[loss_type](sum(some), n, full, tokens) if counts else 0.0 for some in mask for counts in some
    ]
    mask_R = torch.tensor([counts for some in mask for counts in some]) if masked else None
    lengths = [len(some) for some in mask]
    for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        for dtype in (torch.float32, torch.float64):
            got = token_weights(
                given, loss_type, num_items=num_items, max_completion_length=16, mask_R=mask_R, dtype=dtype
            )
            torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype))


def test_token_weights_without_rows_and_mistakes():
    for lengths in ([], [0, 0]):
        assert token_weights(lengths, "dapo").shape == (0,)
        assert token_weights(lengths, "grpo").shape == (0,)
    for arguments, options, message in (
        (([1], "mean"), {}, "got 'mean'"),
        (([1, -2], "grpo"), {}, "got -2"),
        (([1], "dr_grpo"), {}, "needs max_completion_length"),
        (([1], "grpo"), {"num_items": 0}, "num_items: expected a number above 0, got 0"),
        (([1], "seq-mean-token-sum-norm"), {}, "needs max_completion_length"),
        (([1], "grpo"), {"mask_R": torch.ones(2)}, r"mask_R: expected \[1\], got \[2\]"),
        (([1.5], "grpo"), {}, "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            token_weights(*arguments, **options)
