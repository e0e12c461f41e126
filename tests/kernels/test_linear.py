from dataclasses import replace

import pytest
import torch
from losses import full_logits, loss_case, recorded, written_out

import geo_r1.kernels.loss.chunks as chunks
from geo_r1.kernels import GRPOLossConfig, grpo_loss, linear_cross_entropy, linear_grpo_loss, linear_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {"rtol": 1e-10, "atol": 1e-12}
CONFIG = GRPOLossConfig(beta=0.04, entropy_coef=0.1, temperature=0.9)
LEVELS = [CONFIG, replace(CONFIG, importance_sampling_level="sequence")]
LEVEL_IDS = ["token", "sequence"]


def compare(case, config, tolerance=EXACT):
    """Fused against full logits: loss, both gradients, reports."""
    fused, full = case.leaves(), case.leaves()
    got = linear_grpo_loss(fused.hidden_RC, fused.lm_head_VC, **case.rows(), config=config)
    expected = grpo_loss(full_logits(full), **case.rows(), config=config)
    got.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss, **tolerance)
    torch.testing.assert_close(fused.hidden_RC.grad, full.hidden_RC.grad, **tolerance)
    torch.testing.assert_close(fused.lm_head_VC.grad, full.lm_head_VC.grad, **tolerance)
    for name in ("logp_R", "entropy_R", "kl_R", "ratio_R", "clipped_R"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), **tolerance)
    return got, fused


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1000), (33, 1009), (7, 1), (0, 1000), (65, 127)])
def test_odd_sizes(num_rows, vocab, config, monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 10 * vocab * 16)
    case = loss_case(num_rows, vocab)
    got, fused = compare(case, config)
    if num_rows == 0:
        assert got.loss == 0 and not fused.lm_head_VC.grad.any() and got.logp_R.shape == (0,)


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("shift", [20.0, -20.0])
def test_shifted_and_peaked_logits(shift, config):
    case = loss_case(9, 101)
    hidden, head = case.hidden_RC.clone(), case.lm_head_VC.clone()
    hidden[:, 0], head[:, 0] = 1.0, shift  # every logit moves by `shift`
    compare(replace(case, hidden_RC=hidden, lm_head_VC=head), config)
    hidden[:, 1:] *= 30
    peaked = replace(case, hidden_RC=hidden, lm_head_VC=head, old_logp_R=None)
    peaked.target_R[::2] = full_logits(peaked).argmax(-1)[::2]
    logp_RV = (full_logits(peaked) / config.temperature).log_softmax(-1)
    peaked.ref_logp_R = logp_RV.gather(1, peaked.target_R[:, None]).squeeze(1) + 0.1
    got, _ = compare(peaked, config)
    assert got.entropy_R.min() < 1e-6


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
def test_weightless_rows_count_for_nothing(poison, config):
    case = loss_case(12, 23)
    kept = case.token_weight_R != 0
    clean, spoiled = case.leaves(), case.leaves()
    with torch.no_grad():
        spoiled.hidden_RC[~kept] = poison
    rows = case.rows()
    for name in ("advantage_R", "old_logp_R", "ref_logp_R", "importance_weight_R"):
        rows[name] = torch.where(kept, rows[name], poison)
    expected = linear_grpo_loss(clean.hidden_RC, clean.lm_head_VC, **case.rows(), config=config)
    expected.loss.backward()
    logits = full_logits(spoiled.leaves()).detach().requires_grad_()
    full = grpo_loss(logits, **rows, config=config)
    full.loss.backward()
    assert torch.equal(logits.grad[~kept], torch.zeros_like(logits.grad[~kept]))
    got = linear_grpo_loss(spoiled.hidden_RC, spoiled.lm_head_VC, **rows, config=config)
    got.loss.backward()
    assert not spoiled.hidden_RC.grad[~kept].any()
    torch.testing.assert_close(spoiled.hidden_RC.grad, clean.hidden_RC.grad, **EXACT)
    torch.testing.assert_close(spoiled.lm_head_VC.grad, clean.lm_head_VC.grad, **EXACT)
    for out in (got, full):
        for name in ("loss", "logp_R", "entropy_R", "kl_R", "ratio_R", "clipped_R"):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), **EXACT)

    rows["token_weight_R"] = torch.zeros_like(case.token_weight_R)
    leaves = spoiled.leaves()
    got = linear_grpo_loss(leaves.hidden_RC, leaves.lm_head_VC, **rows, config=config)
    got.loss.backward()
    assert got.loss == 0 and not leaves.hidden_RC.grad.any() and not leaves.lm_head_VC.grad.any()
    assert got.ratio_R.eq(1).all() and not got.logp_R.any()


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("policy", ["clip", "sapo"])
def test_gradcheck_of_the_loss(policy, config, monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 2 * 7 * 16)
    case = loss_case(5, 7, hidden=3).leaves()
    options = replace(config, policy=policy)

    def loss(hidden_RC, lm_head_VC):
        return linear_grpo_loss(hidden_RC, lm_head_VC, **case.rows(), config=options).loss

    assert torch.autograd.gradcheck(loss, (case.hidden_RC, case.lm_head_VC))
    logits = full_logits(case).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, **case.rows(), config=options).loss, (logits,))


def test_gradcheck_of_log_probabilities_and_cross_entropy(monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 2 * 7 * 16)
    case = loss_case(5, 7, hidden=3).leaves()
    inputs = (case.hidden_RC, case.lm_head_VC)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, case.target_R, temperature=0.7), inputs)
    for one in (0, 1):  # the other output unused
        assert torch.autograd.gradcheck(lambda h, w, i=one: linear_logprob(h, w, case.target_R)[i], inputs)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, case.target_R, case.token_weight_R), inputs
    )


def test_values_of_log_probabilities_and_cross_entropy(monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 3 * 211 * 16)
    case = loss_case(17, 211).leaves()
    logp_RV = (full_logits(case) / 0.7).log_softmax(-1)
    logp_R, entropy_R = linear_logprob(case.hidden_RC, case.lm_head_VC, case.target_R, temperature=0.7)
    torch.testing.assert_close(logp_R, logp_RV[torch.arange(17), case.target_R], **EXACT)
    torch.testing.assert_close(entropy_R, torch.distributions.Categorical(logits=logp_RV).entropy(), **EXACT)

    inputs = (case.hidden_RC, case.lm_head_VC)
    loss = linear_cross_entropy(*inputs, case.target_R, case.token_weight_R)
    per_row = torch.nn.functional.cross_entropy(full_logits(case), case.target_R, reduction="none")
    expected = (per_row * case.token_weight_R).sum()
    torch.testing.assert_close(loss, expected, **EXACT)
    grads, truth = (torch.autograd.grad(x, inputs) for x in (loss, expected))
    for got, right in zip(grads, truth, strict=True):
        torch.testing.assert_close(got, right, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
def test_full_logits_never_exist(config, dtype, monkeypatch):
    num_rows, vocab, hidden = 96, 1009, 16
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 20 * vocab * 10)
    case = loss_case(num_rows, vocab, hidden, dtype=dtype)
    for op in ("grpo", "logprob", "cross_entropy"):
        leaves = case.leaves()
        inputs = (leaves.hidden_RC, leaves.lm_head_VC)
        runs = {
            "grpo": lambda x=inputs: linear_grpo_loss(*x, **case.rows(), config=config).loss.backward(),
            "logprob": lambda x=inputs: sum(linear_logprob(*x, case.target_R)).sum().backward(),
            "cross_entropy": lambda x=inputs: linear_cross_entropy(
                *x, case.target_R, case.token_weight_R
            ).backward(),
        }
        seen = recorded(runs[op])
        assert leaves.lm_head_VC.grad.any()
        # 25 float32 rows, two buffers: the scratch. A bfloat16 product takes a workspace of its own.
        scratch = 4 * max(25 * vocab, vocab * hidden)
        limit = scratch if dtype == torch.float32 else num_rows * vocab * dtype.itemsize - 1
        assert 0 < seen.largest_bytes <= limit


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_law(dtype, config):
    """At R = 512 and V = 50,021 all that is ever allocated is the scratch, the gradients and rows."""
    num_rows, vocab, hidden = 512, 50_021, 32
    case = loss_case(num_rows, vocab, hidden, dtype=dtype)
    case.token_weight_R[case.token_weight_R == 0] = 1.0
    leaves = case.leaves()
    seen = recorded(
        lambda: linear_grpo_loss(
            leaves.hidden_RC, leaves.lm_head_VC, **case.rows(), config=config
        ).loss.backward()
    )
    gradients = (vocab + num_rows) * hidden * dtype.itemsize
    rows = 64 * num_rows * 8
    assert gradients < seen.peak_bytes <= chunks.SCRATCH_BYTES_CPU + gradients + rows


@pytest.mark.parametrize(
    ("num_rows", "most", "hidden_size", "num_sms", "rows"),
    [
        (8192, 3751, 3584, 132, 3584),  # 3 + 3 + 1 waves of tiles; even chunks of 2,816 take 3 + 3 + 3
        (8192, 3751, 2048, 132, 3072),  # 2 + 2 + 1
        (4096, 3751, 3584, 132, 2048),  # two chunks, 2 + 2
        (3000, 3751, 3584, 132, 3000),  # one chunk
        (12, 5, 3584, 132, 4),  # no tile fits
        (0, 5, 64, 1, 1),
        (1000, 400, 64, 1, 384),
    ],
)
def test_chunks_fill_waves_of_tiles(num_rows, most, hidden_size, num_sms, rows):
    assert chunks.chunk_rows(num_rows, most, hidden_size, num_sms) == rows
    if num_rows:
        assert -(-num_rows // rows) == -(-num_rows // most)  # as few chunks as can be


@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_a_callers_bound_on_the_scratch(impl):
    case = loss_case(24, 997, 16, dtype=torch.float32)
    bound = 8 * 997 * 4
    ops = {
        "grpo": lambda x, **how: linear_grpo_loss(*x, **case.rows(), config=CONFIG, **how).loss,
        "logprob": lambda x, **how: sum(linear_logprob(*x, case.target_R, **how)).sum(),
        "cross_entropy": lambda x, **how: linear_cross_entropy(*x, case.target_R, case.token_weight_R, **how),
    }
    for op in ops.values():
        found = []
        for how in ({}, {"scratch_bytes": bound}):
            leaves = case.leaves()
            inputs = (leaves.hidden_RC, leaves.lm_head_VC)
            seen = recorded(lambda op=op, x=inputs, how=how: op(x, impl=impl, **how).backward())
            found.append((seen.largest_bytes, leaves))
        assert found[1][0] <= max(bound, 997 * 16 * 4) < found[0][0]
        for name in ("hidden_RC", "lm_head_VC"):
            one, other = (getattr(leaves, name).grad for _, leaves in found)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="scratch_bytes: expected a number above 0, got 0"):
            op((case.hidden_RC, case.lm_head_VC), scratch_bytes=0)


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_a_gpus_products_sum_in_float32(head_dtype, monkeypatch):
    """A stand-in for what only a GPU's products have: a result wider than the operands."""
    real, calls = {"mm": torch.mm, "addmm": torch.addmm}, []

    def mm(a, b, *, out_dtype=None, out):
        calls.append(out_dtype)
        return out.copy_(real["mm"](a.double(), b.double())) if out_dtype else real["mm"](a, b, out=out)

    def addmm(total, a, b, *, out_dtype, out):
        assert total is out and out.dtype == out_dtype == torch.float32
        return out.add_(real["mm"](a.double(), b.double()))

    case = loss_case(48, 211, 16, dtype=torch.bfloat16)
    walk = chunks.ChunkWalk(
        case.hidden_RC, case.lm_head_VC.to(head_dtype), "reference", 8 * 211 * 10, needs_head=True
    )
    assert not walk.direct and not walk.sums_wide and len([*walk.chunks()]) > chunks.MAX_NARROW_SUMS
    walk.sums_wide = True
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    d_logits_RV = torch.randn(48, 211, dtype=torch.bfloat16)
    for rows in walk.chunks():
        walk.add_gradients(rows, d_logits_RV[rows])
    found = walk.results()[1]
    assert found.dtype == head_dtype and calls == [torch.float32]
    truth = d_logits_RV.double().T @ case.hidden_RC.double()
    torch.testing.assert_close(
        found.double(), truth, rtol=2.0**-8 if head_dtype != torch.float32 else 1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("vocab", "dtype"), [(1009, torch.float32), (1009, torch.float16), (1, torch.half)])
def test_each_row_of_the_kernels_logits_begins_at_16_bytes(vocab, dtype, impl, monkeypatch):
    """A thread loads 16 bytes at once; the products read and write such rows in place."""
    for name in ("SCRATCH_BYTES", "SCRATCH_BYTES_CPU"):
        monkeypatch.setattr(chunks, name, 12 * 1010 * dtype.itemsize)
    case = loss_case(96, vocab, 16, dtype=dtype)
    hidden_RC, lm_head_VC = case.hidden_RC.to(DEVICE), case.lm_head_VC.to(DEVICE)
    walk = chunks.ChunkWalk(hidden_RC, lm_head_VC, impl, needs_hidden=True, needs_head=True)
    logits_RV = hidden_RC @ lm_head_VC.T
    for rows in walk.chunks():
        logits_rV = walk.logits(rows)
        assert logits_rV.data_ptr() % 16 == logits_rV.stride(0) * dtype.itemsize % 16 == 0
        torch.testing.assert_close(logits_rV, logits_RV[rows])
        walk.add_gradients(rows, logits_rV)
    wide = logits_RV.double()
    truth = wide @ lm_head_VC.double(), wide.T @ hidden_RC.double()
    for got, right in zip(walk.results(), truth, strict=True):
        assert (got.double() - right).norm() < 2e-3 * right.norm()


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's allocations are counted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets, warns of meant infinities
@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
def test_full_logits_of_the_kernels_never_exist(config, impl, monkeypatch):
    num_rows, vocab, hidden = 96, 1009, 16
    scratch = 25 * 1012 * 4
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", scratch)
    case = loss_case(num_rows, vocab, hidden, dtype=torch.float32)
    leaves = case.leaves()
    inputs = (leaves.hidden_RC, leaves.lm_head_VC)
    seen = recorded(
        lambda: linear_grpo_loss(*inputs, **case.rows(), config=config, impl=impl).loss.backward()
    )
    assert leaves.lm_head_VC.grad.any()
    assert 0 < seen.largest_bytes <= scratch < num_rows * vocab * 4


def test_products_that_nobody_needs_are_skipped(monkeypatch):
    case = loss_case(12, 31)
    rows = case.rows()

    def products(hidden_RC, lm_head_VC, config=CONFIG):
        def run():
            out = linear_grpo_loss(hidden_RC, lm_head_VC, **rows, config=config)
            if out.loss.requires_grad:
                out.loss.backward()

        return recorded(run).products

    hidden, head = case.hidden_RC, case.lm_head_VC
    fresh = case.leaves()
    assert products(hidden, head) == 1
    assert products(fresh.hidden_RC, head) == 2 and fresh.hidden_RC.grad.any()
    assert products(hidden, fresh.lm_head_VC) == 2 and fresh.lm_head_VC.grad.any()
    fresh = case.leaves()
    assert products(fresh.hidden_RC, fresh.lm_head_VC) == 3
    assert (
        products(fresh.hidden_RC, fresh.lm_head_VC, LEVELS[1]) == 3
    )  # one chunk: its logits are still there
    with torch.no_grad():
        assert products(fresh.hidden_RC, fresh.lm_head_VC) == 1
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 5 * 31 * 16)  # two chunks of the ten rows that count
    assert products(fresh.hidden_RC, fresh.lm_head_VC, LEVELS[1]) == 2 * 4


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
def test_tied_embeddings_non_contiguous_inputs_and_a_kept_graph(config):
    case = loss_case(11, 29)
    grads = []
    for fused in (False, True):
        leaves = case.leaves()
        embedding = leaves.lm_head_VC
        hidden_RC = (embedding[case.target_R] + leaves.hidden_RC).t().contiguous().t()  # strided
        head_VC = embedding.t().contiguous().t()
        assert not hidden_RC.is_contiguous() and not head_VC.is_contiguous()
        inputs = (hidden_RC, head_VC) if fused else (hidden_RC @ head_VC.T,)
        out = (linear_grpo_loss if fused else grpo_loss)(*inputs, **case.rows(), config=config)
        first = torch.autograd.grad(out.loss, (embedding, leaves.hidden_RC), retain_graph=True)
        second = torch.autograd.grad(out.loss, (embedding, leaves.hidden_RC))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        grads.append(first)
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("config", LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_plain_torchs(dtype, config, monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_BYTES_CPU", 16 * 997 * 12)  # several chunks
    case = loss_case(64, 997, 48, dtype=dtype, seed=3, scale=0.25)
    truth_case = replace(case, hidden_RC=case.hidden_RC.double(), lm_head_VC=case.lm_head_VC.double())

    def run(case, fused):
        leaves = case.leaves()
        inputs = (leaves.hidden_RC, leaves.lm_head_VC) if fused else (full_logits(leaves),)
        out = (linear_grpo_loss if fused else grpo_loss)(*inputs, **case.rows(), config=config)
        out.loss.backward()
        found = (out.loss.detach(), out.logp_R, out.entropy_R, leaves.hidden_RC.grad, leaves.lm_head_VC.grad)
        return [x.double() for x in found]

    truth, plain, fused = run(truth_case, False), run(case, False), run(case, True)
    names = ("loss", "logp", "entropy", "d_hidden", "d_head")
    for name, t, p, f in zip(names, truth, plain, fused, strict=True):
        # A sum's error can be zero by luck: for the loss, a rounding of its value is allowed too.
        floor = torch.finfo(torch.float32).eps * t.abs() if name == "loss" else 0.0
        assert (f - t).norm() <= 2 * (p - t).norm() + floor, name


def test_float16_gradients_survive_small_weights():
    """Gradients of a mean over many tokens vanish in float16, unless they are kept scaled until backward."""
    case = loss_case(16, 64, dtype=torch.float16)
    weight_R, loss_scale = torch.full((16,), 1e-6), 65536.0
    inputs = (case.leaves().hidden_RC, case.leaves().lm_head_VC)
    loss = linear_cross_entropy(*inputs, case.target_R, weight_R)
    (d_hidden_RC,) = torch.autograd.grad(loss * loss_scale, inputs[:1])
    hidden_RC = case.hidden_RC.double().requires_grad_()
    expected = linear_cross_entropy(hidden_RC, case.lm_head_VC.double(), case.target_R, weight_R.double())
    (truth,) = torch.autograd.grad(expected * loss_scale, hidden_RC)
    assert (d_hidden_RC.double() - truth).norm() < 2e-3 * truth.norm()


def test_second_derivatives_are_refused():
    case = loss_case(4, 9).leaves()
    loss = linear_grpo_loss(case.hidden_RC, case.lm_head_VC, **case.rows()).loss.square()
    (grad,) = torch.autograd.grad(loss, case.hidden_RC, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_against_the_formula_in_float32():
    case = loss_case(9, 53, dtype=torch.float32)
    loss, report = written_out(full_logits(case), case, CONFIG)
    out = linear_grpo_loss(case.hidden_RC, case.lm_head_VC, **case.rows(), config=CONFIG)
    assert out.loss.dtype == out.logp_R.dtype == torch.float32
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.entropy_R, report["entropy"])


@pytest.mark.parametrize(
    ("hidden", "head", "message"),
    [
        (torch.zeros(3, 4, 1), torch.zeros(5, 4), r"hidden_RC: expected two dimensions.* got \[3, 4, 1\]"),
        (torch.zeros(3, 4), torch.zeros(5, 6), r"lm_head_VC: expected \[V, 4\] .* got \[5, 6\]"),
        (torch.zeros(3, 4), torch.zeros(0, 4), r"got \[0, 4\]"),
        (torch.zeros(3, 4), torch.zeros(5, 4).half(), "expected torch.float32 on cpu .* got torch.float16"),
        (torch.zeros(3, 4).long(), torch.zeros(5, 4).long(), "torch.int64"),
    ],
)
def test_mistakes_are_named(hidden, head, message):
    target, weight = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    for op, arguments in (
        (linear_grpo_loss, (target, weight, weight)),
        (linear_logprob, (target,)),
        (linear_cross_entropy, (target, weight)),
    ):
        with pytest.raises(ValueError, match=message):
            op(hidden, head, *arguments)
    with pytest.raises(ValueError, match=r"temperature: .* got 0"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(5, 4), target, temperature=0)
