"""The loss kernels against the float64 reference: on the GPU where there is one, else as conftest.py says."""

import itertools
from dataclasses import replace

import pytest
import torch
from losses import full_logits, loss_case
from memory import poison_fresh_memory, replay
from test_grpo_loss import configs, other_configs

import geo_r1.kernels.loss.chunks as chunks
from geo_r1.kernels import GRPOLossConfig, grpo_loss, linear_cross_entropy, linear_grpo_loss, linear_logprob
from geo_r1.kernels.loss.reference import LossRows
from geo_r1.kernels.loss.rows import row_kernels

# NumPy, which interprets the kernels, warns of the infinities that they mean.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REPORTS = ("logp_R", "entropy_R", "kl_R", "ratio_R", "clipped_R")
ALL = GRPOLossConfig(beta=0.04, entropy_coef=0.1, temperature=0.9, delta=3.0, epsilon_high=0.3)
SEQUENCE = replace(ALL, importance_sampling_level="sequence")


def on_device(case, dtype=None):
    """The case where kernels run; with a dtype, float64 hidden states and head rounded to it."""
    tensors = {name: None if x is None else x.to(DEVICE) for name, x in vars(case).items()}
    if dtype is not None:
        tensors |= {name: tensors[name].to(dtype) for name in ("hidden_RC", "lm_head_VC")}
        tensors |= {
            name: x.float()
            for name, x in tensors.items()
            if x is not None and name.endswith(("logp_R", "weight_R", "advantage_R"))
        }
    return type(case)(**tensors)


def wide(case):
    """The same rounded values in float64."""
    return type(case)(
        **{
            name: x.double() if x is not None and x.is_floating_point() else x
            for name, x in vars(case).items()
        }
    )


def results(case, config, *, impl, linear):
    """Loss, reports and both gradients (of the logits where there is no head)."""
    leaves = case.leaves()
    if linear:
        inputs = (leaves.hidden_RC, leaves.lm_head_VC)
        out = linear_grpo_loss(*inputs, **case.rows(), config=config, impl=impl)
    else:
        inputs = (full_logits(leaves).detach().requires_grad_(),)
        out = grpo_loss(*inputs, **case.rows(), config=config, impl=impl)
    grads = torch.autograd.grad(out.loss * 3, inputs)
    return {"loss": out.loss.detach()} | {name: getattr(out, name) for name in REPORTS}, grads


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance / 10)


# Of the losses that plain torch computes between two kernels, a sample.
@pytest.mark.parametrize(
    "config",
    [*configs(), *[*other_configs()][::6]],
    ids=lambda c: f"{c.policy}-{c.importance_sampling_level}",
)
def test_every_option_equals_the_reference(config, monkeypatch, impl):
    for name in ("SCRATCH_BYTES", "SCRATCH_BYTES_CPU"):
        monkeypatch.setattr(chunks, name, 4 * 37 * 4)  # chunks of four rows
    whole = loss_case(9, 37, seed=4)
    given = [(True, True, True), (False, True, False), (True, False, False), (False, False, True)]
    for with_old, with_ref, with_importance in given:
        if config.beta and not with_ref:
            continue
        case = on_device(
            replace(
                whole,
                old_logp_R=whole.old_logp_R if with_old else None,
                ref_logp_R=whole.ref_logp_R if with_ref else None,
                importance_weight_R=whole.importance_weight_R if with_importance else None,
            ),
            torch.float32,
        )
        for linear in (False, True):
            expected, truth = results(wide(case), config, impl="reference", linear=linear)
            actual, grads = results(case, config, impl=impl, linear=linear)
            for name, value in expected.items():
                close(actual[name], value, 2e-5)
            for grad, right in zip(grads, truth, strict=True):
                close(grad, right, 5e-5)


@pytest.mark.parametrize("config", [ALL, SEQUENCE], ids=["token", "sequence"])
@pytest.mark.parametrize(
    ("num_rows", "vocab"), [(1, 1000), (3, 5003), (7, 1), (0, 1000), (33, 127), (2, 20011), (1, 120011)]
)
def test_odd_sizes(num_rows, vocab, config, impl):
    case = on_device(loss_case(num_rows, vocab), torch.float32)
    for linear in (False, True):
        expected, truth = results(wide(case), config, impl="reference", linear=linear)
        actual, grads = results(case, config, impl=impl, linear=linear)
        for name, value in expected.items():
            close(actual[name], value, 1e-4)
        for grad, right in zip(grads, truth, strict=True):
            close(grad, right, 1e-4)


@pytest.mark.skipif(not GPU, reason="a program a row takes the interpreter a minute")
@pytest.mark.parametrize("num_rows", [65_535, 65_536, 70_001])
def test_more_rows_than_a_grid_axis_used_to_hold(num_rows, impl):
    case = on_device(loss_case(num_rows, 7), torch.float32)
    expected, (truth,) = results(wide(case), ALL, impl="reference", linear=False)
    actual, (grad,) = results(case, ALL, impl=impl, linear=False)
    close(actual["logp_R"], expected["logp_R"], 1e-4)
    close(grad, truth, 1e-4)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [ALL, SEQUENCE], ids=["token", "sequence"])
def test_error_is_at_most_twice_plain_torchs(config, dtype, linear, monkeypatch, impl):
    if dtype == torch.bfloat16 and impl == "triton" and not GPU:
        pytest.skip("Triton's interpreter has no bfloat16")
    for name in ("SCRATCH_BYTES", "SCRATCH_BYTES_CPU"):
        monkeypatch.setattr(chunks, name, 24 * 997 * dtype.itemsize)  # three chunks
    case = on_device(loss_case(64, 997, 48, seed=3, scale=0.25), dtype)
    expected, truth = results(wide(case), config, impl="reference", linear=linear)
    # Plain torch: products and logits in the dtype, then float32.
    leaves = case.leaves()
    logits = full_logits(leaves) if linear else full_logits(leaves).detach().requires_grad_()
    plain = grpo_loss(logits, **case.rows(), config=config, impl="reference")
    inputs = (leaves.hidden_RC, leaves.lm_head_VC) if linear else (logits,)
    plain_grads = torch.autograd.grad(plain.loss * 3, inputs)
    actual, grads = results(case, config, impl=impl, linear=linear)
    pairs = {name: (actual[name], getattr(plain, name), expected[name]) for name in ("logp_R", "entropy_R")}
    pairs |= {str(i): x for i, x in enumerate(zip(grads, plain_grads, truth, strict=True))}
    for name, (got, theirs, right) in pairs.items():
        floor = 4 * torch.finfo(torch.float32).eps * right.double().norm()
        error, allowed = ((x.double() - right.double()).norm() for x in (got, theirs))
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, plain torch {allowed:.2e}"


@pytest.mark.parametrize("shift", [20.0, -20.0, -100.0])
def test_shifted_and_sharply_peaked_logits(shift, impl):
    """Columns past the end must not count: exp(0) beside logits near -20 would make logp positive."""
    case = loss_case(9, 101)
    hidden, head = case.hidden_RC.clone(), case.lm_head_VC.clone()
    hidden[:, 0], head[:, 0] = 1.0, shift
    hidden[5:, 1:] *= 30
    case = on_device(
        replace(case, hidden_RC=hidden, lm_head_VC=head, old_logp_R=None, ref_logp_R=None), torch.float32
    )
    config = GRPOLossConfig(entropy_coef=0.1)
    case.target_R[::2] = full_logits(case).argmax(-1)[::2]
    expected, truth = results(wide(case), config, impl="reference", linear=False)
    actual, grads = results(case, config, impl=impl, linear=False)
    assert actual["logp_R"].max() <= 0 and actual["entropy_R"].min() >= -1e-6
    # logits of hundreds are themselves rounded by 1e-5 in float32
    torch.testing.assert_close(actual["logp_R"].double(), expected["logp_R"], rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(grads[0].double(), truth[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e38, -1e4])
def test_entries_masked_with_a_finite_number(fill, impl):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 20_000, generator=g).to(DEVICE)
    logits[:, :17_000] = fill
    target, weight = torch.full((3,), 18_000, device=DEVICE), torch.ones(3, device=DEVICE)
    found = []
    for x, name in ((logits.double(), "reference"), (logits, impl)):
        leaf = x.requires_grad_()
        out = grpo_loss(leaf, target, weight, weight, config=GRPOLossConfig(entropy_coef=0.1), impl=name)
        found.append((out.loss, out.entropy_R, out.logp_R, *torch.autograd.grad(out.loss, leaf)))
    for right, got in zip(*found, strict=True):
        close(got, right, 1e-5)


def test_references_that_rule_a_token_out(impl):
    """ref_logp = -inf: the loss is infinite, the gradient is not."""
    case = on_device(loss_case(4, 9), torch.float32)
    case.ref_logp_R[1] = -torch.inf
    config = GRPOLossConfig(beta=0.1)
    found = [results(x, config, impl=i, linear=False) for x, i in ((wide(case), "reference"), (case, impl))]
    assert all(values["loss"] == torch.inf and grads[0].isfinite().all() for values, grads in found)
    close(found[1][1][0], found[0][1][0], 1e-5)


def test_entries_that_cannot_be_drawn_rows_of_weight_zero_and_strides(impl):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3000, generator=g).to(DEVICE)
    logits[:, 5:2500] = -torch.inf  # whole blocks of them, at the start too
    logits[1, :5] = -torch.inf
    logits[2] = torch.nan
    target = torch.full((6,), 2700, device=DEVICE)
    advantage = torch.randn(6, generator=g).to(DEVICE)
    weight = torch.rand(6, generator=g).to(DEVICE)
    weight[2] = 0
    rows = (target, advantage, weight)
    config = GRPOLossConfig(entropy_coef=0.1, temperature=0.7)
    strided = logits.t().contiguous().t()
    sliced = torch.cat([logits, torch.full((6, 3), torch.nan, device=DEVICE)], 1)[:, :3000]
    for given in (logits, strided, sliced):
        leaf, right = given.requires_grad_(), logits.double().requires_grad_()
        out = grpo_loss(leaf, *rows, config=config, impl=impl)
        expected = grpo_loss(right, *rows, config=config, impl="reference")
        for name in REPORTS:
            close(getattr(out, name), getattr(expected, name), 1e-5)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        (truth,) = torch.autograd.grad(expected.loss, right)
        close(grad, truth, 1e-5)
        assert not grad[2].any() and not grad[:, 5:2500].any()


@pytest.mark.parametrize("column", [0, 2047, 2500])  # in whole blocks of columns, and in the rest
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_spoils_its_row_alone(fault, column, impl):
    logits = torch.randn(3, 2501, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[1, column] = fault
    target, rows = torch.full((3,), 7, device=DEVICE), torch.ones(3, device=DEVICE)
    for config in (GRPOLossConfig(), GRPOLossConfig(entropy_coef=0.1)):
        leaf = logits.clone().requires_grad_()
        out = grpo_loss(leaf, target, rows, rows, config=config, impl=impl)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        for found in (out.logp_R, out.entropy_R, grad[:, 100]):
            assert found.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all() and grad[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_output_is_written(dtype, monkeypatch, impl):
    poison_fresh_memory(monkeypatch)
    case = on_device(loss_case(21, 1009), dtype)
    for config, linear in itertools.product((ALL, SEQUENCE), (False, True)):
        actual, grads = results(case, config, impl=impl, linear=linear)
        assert all(x.isfinite().all() for x in (*actual.values(), *grads))
    leaves = case.leaves()
    inputs = (leaves.hidden_RC, leaves.lm_head_VC)
    logp_R, entropy_R = linear_logprob(*inputs, case.target_R, impl=impl)
    assert all(x.isfinite().all() for x in torch.autograd.grad((logp_R + entropy_R).sum(), inputs))


@pytest.mark.parametrize(("shift", "temperature"), [(300.0, 1.0), (0.0, 1e-2), (0.0, 1e-3), (-1e4, 0.7)])
def test_gradients_where_logits_are_large_or_sharp(shift, temperature, impl):
    case = on_device(loss_case(6, 1009), torch.float32)
    g = torch.Generator().manual_seed(2)
    logits = (5 * torch.randn(6, 1009, generator=g) + shift).to(DEVICE)

    def gradient(logits, case, impl):
        x = logits.clone().requires_grad_()
        config = replace(ALL, temperature=temperature, beta=0.0)
        rows = case.rows() | {"old_logp_R": None, "ref_logp_R": None}
        return torch.autograd.grad(grpo_loss(x, **rows, config=config, impl=impl).loss, x)[0].double()

    truth = gradient(logits.double(), wide(case), "reference")
    plain, actual = (gradient(logits, case, name) for name in ("reference", impl))
    error, allowed = ((x - truth).abs().amax() for x in (actual, plain))
    floor = 4 * torch.finfo(torch.float32).eps * truth.abs().amax()
    assert error <= 2 * allowed + floor, f"{error:.1e}, plain torch {allowed:.1e}"


@pytest.mark.parametrize("target", [-1, 9, 1 << 40])
def test_a_target_out_of_range_is_nan_and_not_a_read_elsewhere(target, impl):
    case = on_device(loss_case(4, 9), torch.float32)
    case.target_R[0] = target  # which the public functions refuse where they can see it
    logits, kernels = full_logits(case), row_kernels(impl)
    gradient = torch.empty_like(logits)
    _, *found = kernels.grpo_row_loss(logits, case.target_R, LossRows(*row_inputs(case)), ALL, gradient)
    for logp, entropy, _ in (found, kernels.row_statistics(logits, case.target_R, ALL.temperature)):
        assert logp[0].isnan() and logp[1].isfinite() and entropy[:2].isfinite().all()
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


def row_inputs(case):
    """The fields of LossRows."""
    return [getattr(case, name) for name in LossRows._fields]


@pytest.mark.parametrize(("num_rows", "vocab"), [(29, 1008), (9, 152_064), (4, 270_001)])
def test_rows_that_are_kept_and_rows_that_are_too_long(num_rows, vocab, impl):
    """The gradient needs every logit again, in place too, aligned or not; rows of weight zero lie between."""
    interpreted = impl == "triton" and not GPU
    if interpreted and vocab > 1008:
        pytest.skip("the interpreter takes a minute")
    dtype = torch.float16 if interpreted else torch.bfloat16
    g = torch.Generator().manual_seed(3)
    drawn = (3 * torch.randn(num_rows, vocab, generator=g)).to(DEVICE, dtype)
    target = torch.randint(0, vocab, (num_rows,), generator=g).to(DEVICE)
    advantage, weight = torch.randn(2, num_rows, generator=g).to(DEVICE)
    weight[1::3] = 0
    config = GRPOLossConfig(entropy_coef=0.1, temperature=0.8)
    leaf = drawn.double().requires_grad_()
    expected = grpo_loss(leaf, target, advantage, weight, config=config, impl="reference")
    (truth,) = torch.autograd.grad(expected.loss, leaf)
    allowed = (truth.to(dtype).double() - truth).norm()
    drawn[1::3] = torch.nan
    for first, padding, in_place in itertools.product((0, 1), (0, 5, 8), (False, True)):
        logits, out = (
            torch.full((num_rows, first + vocab + padding), torch.nan, dtype=dtype, device=DEVICE)
            for _ in range(2)
        )
        inside = slice(first, first + vocab)
        logits[:, inside] = drawn
        out = logits if in_place else out
        rows = LossRows(advantage, weight, None, None, None, None)
        terms, logp, entropy, _ = row_kernels(impl).grpo_row_loss(
            logits[:, inside], target, rows, config, out[:, inside]
        )
        close(terms.loss_R.double().sum(), expected.loss, 1e-5)
        close(logp, expected.logp_R, 1e-5)
        close(entropy, expected.entropy_R, 1e-5)
        assert (out[:, inside].double() - truth).norm() <= 1.01 * allowed
        assert not out[1::3, inside].any() and out.isnan().sum() == num_rows * (first + padding)


@pytest.mark.parametrize("unused", [None, "logp", "entropy"])
def test_log_probabilities(unused, monkeypatch, impl):
    for name in ("SCRATCH_BYTES", "SCRATCH_BYTES_CPU"):
        monkeypatch.setattr(chunks, name, 5 * 211 * 4)
    case = on_device(loss_case(17, 211), torch.float32)
    grads = []
    for x, name in ((wide(case), "reference"), (case, impl)):
        leaves = x.leaves()
        inputs = (leaves.hidden_RC, leaves.lm_head_VC)
        rows = dict(
            zip(
                ("logp", "entropy"),
                linear_logprob(*inputs, x.target_R, temperature=0.7, impl=name),
                strict=True,
            )
        )
        rows.pop(unused, None)
        total = sum((row * torch.arange(17, device=DEVICE)).sum() for row in rows.values())
        grads.append((*rows.values(), *torch.autograd.grad(total, inputs)))
    # p comes from a log-sum-exp that was rounded to float32: 1e-6 of p, beside sums that nearly cancel.
    for right, got in zip(*grads, strict=True):
        close(got, right, 5e-5)


def test_cross_entropy(impl):
    case = on_device(loss_case(17, 211), torch.float32)
    found = []
    for x, name in ((wide(case), "reference"), (case, impl)):
        leaves = x.leaves()
        loss = linear_cross_entropy(
            leaves.hidden_RC, leaves.lm_head_VC, x.target_R, x.token_weight_R, impl=name
        )
        found.append((loss, *torch.autograd.grad(loss, (leaves.hidden_RC, leaves.lm_head_VC))))
    for right, got in zip(*found, strict=True):
        close(got, right, 1e-5)


def test_a_float32_head_gets_a_float32_gradient_from_narrow_products(impl):
    """The head's gradient is summed in float32 and handed out as it is."""
    case = on_device(loss_case(33, 127, 16), torch.float32)
    hidden = case.hidden_RC.half()
    found = []
    for name in ("reference", impl):
        head = case.lm_head_VC.clone().requires_grad_()
        out = linear_grpo_loss(hidden, head, **case.rows(), config=ALL, impl=name)
        found.append(torch.autograd.grad(out.loss, head)[0])
        assert found[-1].dtype == torch.float32
    truth_head = case.lm_head_VC.half().double().requires_grad_()
    rows = wide(case).rows()
    out = linear_grpo_loss(hidden.double(), truth_head, **rows, config=ALL, impl="reference")
    (truth,) = torch.autograd.grad(out.loss, truth_head)
    for grad in found:
        assert (grad.double() - truth).norm() < 4e-3 * truth.norm()


@pytest.mark.parametrize(
    ("impl", "head_dtype"),
    [
        ("reference", torch.float16),
        ("reference", torch.float32),
        ("triton", torch.float16),
        ("cuda", torch.float16),
    ],
)
def test_float16_gradients_survive_many_rows_that_agree(impl, head_dtype):
    """Kept scaled too far up, the head's gradient would overflow: a sum over rows, where each is small."""
    num_rows = 520
    hidden_RC, head_VC = (
        torch.zeros(num_rows, 4, device=DEVICE).half(),
        torch.zeros(7, 4).to(DEVICE, head_dtype),
    )
    head_VC.requires_grad_()
    hidden_RC[:, 0] = 256.0
    target_R = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    weight_R = torch.full((num_rows,), 1 / num_rows, device=DEVICE)
    loss = linear_cross_entropy(hidden_RC, head_VC, target_R, weight_R, impl=impl)
    (d_head_VC,) = torch.autograd.grad(loss, head_VC)
    expected = torch.full((7,), 256 / 7, device=DEVICE)
    expected[0] -= 256
    torch.testing.assert_close(d_head_VC[:, 0].float(), expected, rtol=2e-3, atol=0)


def test_autocast_runs_products_in_its_dtype(impl):
    dtype = torch.bfloat16 if GPU else torch.float16
    case = on_device(loss_case(9, 31), torch.float32)
    with torch.autocast(DEVICE.type, dtype):
        inside = linear_grpo_loss(case.hidden_RC, case.lm_head_VC, **case.rows(), impl=impl)
        logp, _ = linear_logprob(case.hidden_RC, case.lm_head_VC, case.target_R, impl=impl)
    outside = linear_grpo_loss(case.hidden_RC.to(dtype), case.lm_head_VC, **case.rows(), impl=impl)
    assert torch.equal(inside.loss, outside.loss) and torch.equal(inside.logp_R, outside.logp_R)
    kept = case.token_weight_R != 0
    assert logp.dtype == torch.float32 and torch.equal(logp[kept], outside.logp_R[kept])


@pytest.mark.parametrize("config", [ALL, SEQUENCE], ids=["token", "sequence"])
@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_ops_pass_opcheck(impl, config):
    case = on_device(loss_case(6, 13), torch.float32).leaves()
    rows = tuple(case.rows().values())
    logits = full_logits(case).detach().requires_grad_()
    ops = torch.ops.geo_r1
    torch.library.opcheck(ops.grpo_loss.default, (logits, *rows, *config.values, impl))
    row = torch.rand(6, device=DEVICE)
    scalar = torch.ones((), device=DEVICE)
    lse = torch.rand(6, 2, device=DEVICE)
    arguments = (logits.detach(), case.target_R, lse, row, row, row, scalar, True, 0.7, impl)
    torch.library.opcheck(ops.logit_gradient.default, arguments)
    inputs = (case.hidden_RC, case.lm_head_VC)
    strided = case.hidden_RC.detach().t().contiguous().t().requires_grad_()  # as its gradient is not
    for hidden in (case.hidden_RC, strided):
        arguments = (hidden, case.lm_head_VC, *rows, *config.values, True, True, impl, 0)
        torch.library.opcheck(ops.linear_grpo_loss.default, arguments)
    torch.library.opcheck(ops.linear_logprob.default, (*inputs, case.target_R, 0.7, impl, 0))
    hidden, head = (x.detach() for x in inputs)
    arguments = (row, None, hidden, head, case.target_R, 0.7, True, False, impl, 0)
    torch.library.opcheck(ops.linear_logprob_backward.default, arguments)
    torch.library.opcheck(ops.scaled.default, (hidden, scalar))


@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_ops_compile_without_a_graph_break(impl):
    case = on_device(loss_case(9, 31), torch.float32)

    def losses(hidden, head):
        rows = case.rows()
        logp, entropy = linear_logprob(hidden, head, case.target_R, impl=impl)
        entropy_loss = linear_cross_entropy(hidden, head, case.target_R, case.token_weight_R, impl=impl)
        fused = linear_grpo_loss(hidden, head, **rows, config=ALL, impl=impl)
        full = grpo_loss(hidden @ head.T, **rows, config=ALL, impl=impl)
        return fused.loss + full.loss + entropy_loss + (logp * entropy).sum()

    found = []
    for run in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        loss = run(leaves.hidden_RC, leaves.lm_head_VC)
        found.append((loss, *torch.autograd.grad(loss, (leaves.hidden_RC, leaves.lm_head_VC))))
    for eager, compiled in zip(*found, strict=True):
        close(compiled, eager, 1e-6)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_the_loss(impl):
    case = on_device(loss_case(64, 997, 48), torch.bfloat16).leaves()
    inputs = (case.hidden_RC, case.lm_head_VC)

    def step():
        out = linear_grpo_loss(*inputs, **case.rows(), config=ALL, impl=impl)
        return out.loss, *torch.autograd.grad(out.loss, inputs)

    eager, captured = step(), replay(step)
    for got, right in zip(captured, eager, strict=True):
        assert torch.equal(got, right)


def test_float64_is_for_the_reference(impl):
    case = on_device(loss_case(5, 11))
    with pytest.raises(ValueError, match=f"impl='{impl}' does not take float64 inputs"):
        grpo_loss(full_logits(case), **case.rows(), impl=impl)
    with pytest.raises(ValueError, match=f"linear_grpo_loss: impl='{impl}' does not take float64"):
        linear_grpo_loss(case.hidden_RC, case.lm_head_VC, **case.rows(), impl=impl)
    assert grpo_loss(full_logits(case), **case.rows()).loss.dtype == torch.float64


@pytest.mark.parametrize("op", ["grpo_loss", "linear_logprob"])
def test_second_derivatives_are_refused(op, impl):
    case = on_device(loss_case(4, 9), torch.float32).leaves()
    if op == "grpo_loss":
        x = full_logits(case).detach().requires_grad_()
        value = grpo_loss(x, **case.rows(), impl=impl).loss.square()
    else:
        x = case.hidden_RC
        value = linear_logprob(x, case.lm_head_VC, case.target_R, impl=impl)[0].square().sum()
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
