"""How long kernels take on an H200, from what their loops spend."""

import pytest

pytest.importorskip("triton")

from geo_r1.kernels import aot, floor, sass

TARGET = floor.Target(("loss", "", "_loss_kernel"), "4 x 5", elements=1e9, bytes=4.3e9, multiply_adds=0)


@pytest.mark.parametrize(
    ("spent", "bound", "milliseconds"),
    [
        (sass.Pace(instructions=10, exponentials=1), "bytes", 1.0),
        (sass.Pace(instructions=67, exponentials=2), "issue slots", 67 / 33.45408),
        (sass.Pace(instructions=67, exponentials=16), "exponentials", 16 / 4.18176),
        (sass.Pace(multiply_adds={"HGMMA": 788}), "tensor cores", 2.0),
        (sass.Pace(multiply_adds={"HMMA TF32": 788}), "tensor cores", 2.0 / 0.3145),
    ],
)
def test_the_slowest_unit_bounds_the_time(spent, bound, milliseconds):
    times = floor.bounds(TARGET, spent)
    assert max(times, key=times.get) == bound
    assert times[bound] == pytest.approx(milliseconds)


def test_a_line_for_each_kernel():
    heading, line = floor.table([("_loss_kernel", TARGET, sass.Pace(46.8125, 2.0625, 4.0, 2.0))])
    assert len(heading) == len(line) == len(floor.ALIGNS)
    assert line == (
        "_loss_kernel",
        "4 x 5",
        "46.81",
        "2.06",
        "6.00",
        "-",
        "issue slots",
        "1.399",
        "1.000",
        "71%",
    )


def test_sizes_of_the_targets():
    by_place = {(target.place[2], target.size): target for target in floor.TARGETS}
    loss = by_place["_loss_kernel", "4096 x 152064"]
    assert (loss.elements, loss.bytes) == (622854144, 4 * 622854144)
    text = by_place["_d_key_kernel", "causal 4 x 4096"]
    assert text.elements == 28 * 4 * 4096 * 4097 // 2
    assert text.bytes == 16384 * 128 * 2 * (4 * 28 + 2 * 4)
    assert text.multiply_adds == text.elements * 4 * 128
    labels = {
        (family, label) for family in ("loss", "attention") for label, _ in aot._load(family).aot_cases()
    }
    assert {target.place[:2] for target in floor.TARGETS} <= labels
