"""The emulator: right kernels give right numbers, and mistakes are found."""

import ctypes
import itertools
import re

import pytest
import torch
from emulator import build
from emulator.fenced import fenced

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

ORDERS = ("forward", "backward", "shuffled")
ADVERSARIES = list(itertools.product((True, False), ORDERS))
THREADS = 128
TYPES = (torch.bfloat16, torch.float16)
SWIZZLES = {16: 1, 32: 2, 64: 3}  # columns of a row of 16-bit numbers -> CUtensorMapSwizzle


@pytest.fixture(scope="session")
def library():
    path = build.link([build.HERE / "toys.cu"], [f"-I{build.HERE / 'include'}", f"-I{build.CSRC}"], "toys.so")
    return build.prepare(path)


@pytest.fixture
def toy(library):
    """Runs a toy, raising what its launch threw; `toy.adversary(late, order)` as in build.py."""

    def run(name, *arguments):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        if what := function(*map(convert, arguments)):
            raise RuntimeError(what.decode())

    def convert(x):
        if isinstance(x, torch.Tensor):
            assert x.is_contiguous()
            return ctypes.c_void_p(x.data_ptr())
        return x

    run.adversary = lambda late=True, order="forward", seed=0: build.set_adversary(library, late, order, seed)
    run.adversary()
    yield run
    run.adversary()


def in_every_way(toy, function):
    """Whether a kernel gives the right result, for each adversary."""
    right = {}
    for late, order in ADVERSARIES:
        toy.adversary(late, order)
        right[late, order] = function()
    return right


# ---- threads


def block_sum_is_right(toy, with_barrier):
    x, out = torch.arange(3.0 * THREADS), torch.full((3,), torch.nan)
    toy("block_sum", x, out, 3, with_barrier)
    return torch.equal(out, x.view(3, THREADS).sum(1))


def test_block_sum(toy):
    assert all(in_every_way(toy, lambda: block_sum_is_right(toy, True)).values())


def test_missing_barrier_shows(toy):
    right = in_every_way(toy, lambda: block_sum_is_right(toy, False))
    assert not right[True, "forward"]


def test_shuffles(toy):
    x, out = torch.randn(THREADS, dtype=torch.float64), torch.empty(THREADS, dtype=torch.float64)
    for late, order in ADVERSARIES:
        toy.adversary(late, order)
        toy("shuffle", x, out.fill_(torch.nan))
        halves = x.view(-1, 32).roll(-1, 1)[:, ::16]
        assert torch.equal(out, halves.repeat_interleave(16, 1).flatten())


def test_meetings_of_some_threads(toy):
    out = torch.empty(1, dtype=torch.int32)
    for late, order in ADVERSARIES:
        toy.adversary(late, order)
        toy("turns", out.zero_())
        assert out.item() == 7


# ---- copies by every thread for itself


@pytest.mark.parametrize("waited_groups", [0, 1, 2])
@pytest.mark.parametrize("count", [8 * THREADS, 1021, 3])
def test_copies_arrive_when_waited_for(toy, count, waited_groups):
    x = torch.arange(1.0, 8 * THREADS + 1)
    x[count:] = torch.nan  # is not read
    full = torch.where(x.isnan(), 0, x)
    out = torch.empty(8 * THREADS)
    toy("copy", x, out, count, waited_groups)
    late = full.view(THREADS, 2, 4).clone()
    late[:, waited_groups:] = torch.nan  # shared memory starts as NaN
    assert torch.equal(out.isnan(), late.flatten().isnan())
    assert torch.equal(out.nan_to_num(), late.flatten().nan_to_num())
    toy.adversary(late=False)
    toy("copy", x, out, count, waited_groups)
    assert torch.equal(out, full)


# ---- boxes


def ring_is_right(toy, columns, bug=0):
    T, H, D, rows, tiles = 50, 3, 64, 24, 3
    x = torch.randint(0, 1 << 15, (T, H, D), dtype=torch.int16)
    out = torch.full((rows * tiles, D), -1, dtype=torch.int16)
    try:
        toy("ring", x, out, T, H, D, tiles, SWIZZLES[columns], columns, bug)
    except RuntimeError:
        return False
    want = torch.zeros_like(out)  # the first tile starts 3 tokens before the tensor, the last ends behind it
    want[3 : 3 + T] = x[:, 1]
    return torch.equal(out, want)


@pytest.mark.parametrize("columns", SWIZZLES)
def test_ring_of_boxes(toy, columns):
    assert all(in_every_way(toy, lambda: ring_is_right(toy, columns)).values())


def test_full_not_awaited_shows(toy):
    assert not in_every_way(toy, lambda: ring_is_right(toy, 64, bug=1))[True, "forward"]


def test_empty_not_awaited_shows(toy):
    assert not in_every_way(toy, lambda: ring_is_right(toy, 64, bug=2))[False, "forward"]


def test_maps_that_the_driver_refuses(toy):
    x = torch.zeros(1000, dtype=torch.int16)
    toy("encodable", x, 64, 64, 256, 3)
    for columns, rows, swizzle in [(64, 257, 3), (64, 0, 3), (64, 8, 2), (12, 8, 0), (0, 8, 0)]:
        with pytest.raises(RuntimeError, match="no map"):
            toy("encodable", x, 64, columns, rows, swizzle)
    with pytest.raises(RuntimeError, match="no map"):
        toy("encodable", x, 20, 16, 8, 1)  # strides of 40 bytes
    with pytest.raises(RuntimeError, match="no map"):
        toy("encodable", x[1:], 64, 64, 8, 3)


# ---- products


def product(toy, dtype, n, in_shared, swizzle, *, fenced=True, overwrites=False):
    """Returns d, d before the wait, and what d must be."""
    K = 8 << swizzle
    a = torch.randn(64, K).to(dtype)
    b = torch.randn((n, K) if in_shared else (K, n)).to(dtype)
    d, early = torch.full((64, n), torch.nan), torch.full((64, n), torch.nan)
    toy("product", dtype == torch.bfloat16, n, in_shared, a, b, d, early, swizzle, fenced, overwrites)
    return d, early, 1 + a.double() @ (b.double().T if in_shared else b.double())


@pytest.mark.parametrize("swizzle", [1, 2, 3])
@pytest.mark.parametrize("in_shared", [True, False])
def test_products(toy, in_shared, swizzle):
    torch.manual_seed(0)
    for dtype, n, adversary in itertools.product(TYPES, (16, 32, 64, 128), ADVERSARIES):
        toy.adversary(*adversary)
        d, _, want = product(toy, dtype, n, in_shared, swizzle)
        assert (d - want).abs().max() < 1e-4


def test_products_come_when_waited_for(toy):
    d, early, want = product(toy, torch.bfloat16, 64, True, 3)
    assert (d - want).abs().max() < 1e-4
    assert torch.equal(early, torch.ones(64, 64))


def test_missing_fence_shows(toy):
    d, _, _ = product(toy, torch.bfloat16, 64, True, 3, fenced=False)
    assert d.isnan().all()


def test_operand_overwritten_too_soon_shows(toy):
    d, _, want = product(toy, torch.bfloat16, 64, True, 3, overwrites=True)
    assert (d - want).abs().max() > 1


# ---- mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    {
        "exit": "nothing can go on; 1 have ended; 127 wait at meeting 0, where 127 of 128 are",
        "lanes": "nothing can go on; 64 have ended; 64 wait for other lanes of mask ffffffff",
        "masks": "lanes meet with different masks",
        "outside": "thread 0: a shuffle from a lane outside of the mask",
        "meeting": "1 wait at meeting 1, where 1 of 64 are; 63 wait at meeting 2, where 63 of 64 are",
        "counts": "thread 32: meeting 1 of 96 threads, but 64 for those who are there",
        "shared": "wrote outside of its 2048 bytes of shared memory",
        "far": "thread 0: touches byte 9000 of its 2048 bytes of shared memory",
        "invalid": "thread 0: touches the address 0x10, which is invalid",
        "impossible": "thread 0: touches an address that is misaligned or too large for any memory",
        "misaligned copy": "copy_16 to an address that 16 does not divide",
        "no barrier": "a barrier that was not initialised",
        "barrier not fenced": "a barrier that another thread initialised without fence_barrier_init",
        "barrier": "128 wait at barrier 0, whose phase of parity 0 lacks 2 arrivals and 0 bytes",
        "box": "copy_box to an address that 128 does not divide",
        "box outside": "a copy or product reaches byte ",
        "bytes": "128 wait at barrier 0, whose phase of parity 0 lacks 0 arrivals and 640 bytes",
        "arrivals": "thread 0: arrives at a barrier that expects no more arrivals in this phase",
        "lost copy": "ends while 1 copies of boxes are under way",
        "no fence": "a product without product_fence",
        "no wait": "ends with products that it did not wait for",
        "no commit": "ends with products that it did not wait for",
        "different products": "lanes of a warpgroup issue different products",
        "half a warpgroup": "64 wait for products that not all of their warpgroup have reached",
        "operand outside": "a copy or product reaches byte ",
    }.items(),
)
def test_mistakes_are_reported(toy, mistake, message):
    with pytest.raises(RuntimeError) as caught:
        toy("mistake", mistake.encode(), torch.zeros(128, dtype=torch.int16))
    assert re.fullmatch(f"toy: block 0 of 2.*{re.escape(message)}.*", str(caught.value))
    toy("shuffle", torch.randn(THREADS, dtype=torch.float64), torch.empty(THREADS, dtype=torch.float64))


@pytest.mark.parametrize("late", [True, False])
def test_read_behind_a_tensor_is_reported(toy, late):
    toy.adversary(late)
    x, out = fenced(torch.randn(8 * THREADS - 4)), torch.empty(8 * THREADS)
    toy("copy", x, out, 8 * THREADS - 4, 2)
    with pytest.raises(RuntimeError, match="thread 127: touches the address 0x"):
        toy("copy", x, out, 8 * THREADS, 2)


def test_shared_memory_that_no_block_has(toy):
    with pytest.raises(RuntimeError, match="toy: invalid argument"):
        toy("too_much_shared", 227 * 1024 + 1)
