"""Images at the size the model takes: the processor's bits, decoded once, shrunk until prompts fit."""

import itertools

import numpy as np
import pytest
import torch
from data_cases import encoded, make_image
from loader_cases import encoder, sample

from geo_r1.data import OverlongPromptError
from geo_r1.data.images import ImageCache, LazyImage, fitted, num_tokens, shrunk

SIZES = ((56, 56), (28, 28), (5, 3), (61, 300), (300, 61), (500, 500), (199, 1), (2000, 11), (43, 41))


def processed(images, **options):
    """What the processor makes of images by itself, its own resizing included."""
    processor = encoder(**options).image_processor
    return processor(list(images), return_tensors="pt")


@pytest.mark.parametrize("options", [{}, {"max_pixels": 4 * 28 * 28}, {"max_pixels": 1000}])
def test_the_bits_are_the_processors_with_and_without_a_cache(tmp_path, options):
    images = [make_image(*size, seed) for seed, size in enumerate(SIZES)]
    expected = processed(images, **options)
    stored = []
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
        stored.append((tmp_path / f"{index}.png", encoded(image, "WEBP", lossless=True), image)[index % 3])
    cached = encoder(**options).with_cache(1 << 24)
    for maker in (encoder(**options), cached, cached, encoder(**options).with_cache(5000)):
        for sources in (images, stored):
            prompt = maker.encode(sample("x", *sources))
            assert torch.equal(prompt.pixel_values, expected["pixel_values"])
            assert list(map(list, prompt.image_grids)) == expected["image_grid_thw"].tolist()
    assert (cached.cache.hits, cached.cache.misses) == (21, 15)  # six files; the others are in `images`


def test_jpeg_and_upright_images_pass_through_the_cache(tmp_path):
    exif = make_image(1, 1).getexif()
    exif[0x0112] = 6
    data = encoded(make_image(90, 40), "JPEG", exif=exif)
    cached = encoder().with_cache(1 << 20)
    expected = encoder().encode(sample("x", data))
    assert expected.image_grids == ((1, 6, 2),)
    for _ in range(2):
        assert torch.equal(cached.encode(sample("x", data)).pixel_values, expected.pixel_values)
    assert (cached.cache.hits, cached.cache.misses) == (1, 1)


def test_a_tile_that_changes_on_disk_is_another_image(tmp_path):
    cached, path = encoder().with_cache(1 << 20), tmp_path / "tile.png"
    for seed in range(2):
        make_image(56, 56, seed).save(path)
        expected = processed([make_image(56, 56, seed)])["pixel_values"]
        assert torch.equal(cached.encode(sample("x", path)).pixel_values, expected)
    assert (cached.cache.hits, cached.cache.misses) == (0, 2)


def test_the_cache_keeps_to_its_budget_and_drops_what_was_longest_unused():
    one = 28 * 28 * 3
    cache = ImageCache(3 * one)
    data = [encoded(make_image(28, 28, seed)) for seed in range(5)]

    def use(index, size=28):
        return LazyImage(data[index], "x", cache).resized((size, size), 3)

    for index in (0, 1, 2, 0, 3, 0, 1):  # 1 went for 3, and then 2 for 1
        assert np.array_equal(use(index), make_image(28, 28, index))
    assert (cache.hits, cache.misses, cache.num_bytes, len(cache)) == (2, 5, 3 * one, 3)
    use(3), use(0)
    assert cache.hits == 4
    use(4, 84)  # larger than the whole budget: not kept, and nothing went for it
    assert (cache.num_bytes, len(cache)) == (3 * one, 3)
    use(4, 56)  # as large as the budget and more
    assert (cache.num_bytes, len(cache)) == (3 * one, 3)
    assert not use(0).flags.writeable
    use(0, 14)
    assert cache.num_bytes <= 3 * one and np.array_equal(use(0), make_image(28, 28, 0))


def test_no_budget_keeps_and_counts_nothing():
    cache = ImageCache(0)
    for _ in range(2):
        LazyImage(encoded(make_image(28, 28)), "x", cache).resized((28, 28), 3)
    assert (cache.hits, cache.misses, cache.num_bytes, len(cache)) == (0, 0, 0, 0)


def test_two_sizes_of_one_image_are_two_entries():
    cache, data = ImageCache(1 << 20), encoded(make_image(100, 50))
    for _ in range(2):
        assert LazyImage(data, "x", cache).resized((28, 56), 3).shape == (28, 56, 3)
        assert LazyImage(data, "x", cache).resized((56, 112), 3).shape == (56, 112, 3)
        assert LazyImage(data, "x", cache).size == (50, 100)
    assert (cache.hits, cache.misses) == (2, 2)


def test_shrinking_takes_the_largest_sizes_that_fit():
    draw = np.random.default_rng(0)
    for _ in range(40):
        whole = [tuple(map(int, draw.integers(10, 600, 2))) for _ in range(draw.integers(1, 7))]
        targets = [fitted(size, 28, 28 * 28, 64 * 28 * 28) for size in whole]
        total = sum(num_tokens(target, 28) for target in targets)
        previous = None
        for budget in range(total - 1, 0, -max(total // 9, 1)):
            sizes = shrunk(whole, targets, 28, budget)
            if budget < len(whole):
                assert sizes is None
                continue
            assert sum(num_tokens(size, 28) for size in sizes) <= budget
            for (height, width), target, before in zip(sizes, targets, previous or targets, strict=True):
                assert height % 28 == width % 28 == 0 and height * width <= target[0] * target[1]
                assert height * width <= before[0] * before[1]  # a smaller budget never gives more
            previous = sizes
    assert shrunk([(280, 280)], [(280, 280)], 28, 99) == [(252, 252)]
    assert shrunk([(280, 280)] * 2, [(280, 280)] * 2, 28, 161) == [(224, 224)] * 2  # one share for all
    assert shrunk([(280, 280), (56, 56)], [(280, 280), (56, 56)], 28, 30) == [(140, 140), (28, 28)]


def test_long_prompts_shrink_their_images():
    case = sample("x", make_image(224, 224), make_image(56, 56, 1), make_image(140, 84, 2))
    whole = encoder().encode(case)
    text = len(whole.token_ids) - len(whole.image_rows)
    assert len(whole.image_rows) == 64 + 4 + 15
    resize = {"on_overlong": "resize"}
    fits = encoder(max_prompt_tokens=text + 83, **resize).encode(case)
    assert torch.equal(fits.pixel_values, whole.pixel_values) and fits.token_ids == whole.token_ids
    seen = []
    for budget in (82, 40, 20, 3):
        small = encoder(max_prompt_tokens=text + budget, **resize).encode(case)
        again = encoder(max_prompt_tokens=text + budget, **resize).with_cache(1 << 20).encode(case)
        assert torch.equal(small.pixel_values, again.pixel_values) and small.image_grids == again.image_grids
        assert len(small.image_rows) <= budget and len(small.token_ids) == text + len(small.image_rows)
        shapes = [(28 * h // 2, 28 * w // 2) for _, h, w in small.image_grids]
        pixels = [
            processed([image.resize(shape[::-1], 3)])["pixel_values"]
            for image, shape in zip(case.images, shapes, strict=True)
        ]
        assert torch.equal(small.pixel_values, torch.cat(pixels))
        seen.append([h * w // 4 for _, h, w in small.image_grids])
    assert seen == [[49, 1, 8], [25, 1, 6], [16, 1, 3], [1, 1, 1]]
    assert all(a >= b for more, less in itertools.pairwise(seen) for a, b in zip(more, less, strict=True))


@pytest.mark.parametrize("rule", ["error", "skip"])
def test_what_is_over_the_budget(rule):
    case = sample("row 7", make_image(224, 224), text="where?")
    length = len(encoder().encode(case).token_ids)
    assert len(encoder(max_prompt_tokens=length, on_overlong=rule).encode(case).token_ids) == length
    with pytest.raises(OverlongPromptError) as caught:
        encoder(max_prompt_tokens=length - 1, on_overlong=rule).encode(case)
    assert str(caught.value) == (
        f"sample row 7: the prompt has {length} tokens, 64 of them images; the budget is {length - 1}. "
        "Raise data.max_prompt_tokens, lower data.max_pixels, or set data.on_overlong to skip or resize"
    )


def test_what_does_not_fit_at_its_smallest():
    case = sample("row 7", make_image(224, 224), make_image(224, 224, 1))
    text = len(encoder().encode(case).token_ids) - 128
    make = encoder(max_prompt_tokens=text + 1, on_overlong="resize")
    with pytest.raises(OverlongPromptError) as caught:
        make.encode(case)
    assert str(caught.value) == (
        f"sample row 7: the prompt has {text + 128} tokens, 128 of them images; the budget is {text + 1}. "
        f"With its 2 images at their smallest, a token each, it has {text + 2}; raise data.max_prompt_tokens"
    )
    with pytest.raises(OverlongPromptError, match=r"0 of them images; .* raise data\.max_prompt_tokens$"):
        encoder(max_prompt_tokens=3, on_overlong="resize").encode(sample("text"))
