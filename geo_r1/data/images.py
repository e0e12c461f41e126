"""Images resized for the model, and a cache of decoded images."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from geo_r1.data.decoding import ImageSource, load_image, read_image

Size = tuple[int, int]  # height and width in pixels
SHRINK_STEPS = 4096  # possible scales when images shrink; neighbours differ by less than one token


class ImageCache:
    """Decoded and resized images, keyed by their content; the least recently used are dropped first.

    Args:
        max_bytes: limit on the bytes of pixels; 0 keeps nothing.

    Attributes:
        num_bytes: bytes of pixels in the cache.
        hits, misses: how many lookups found an image, and how many did not.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._pixels: OrderedDict[tuple[bytes, Size], np.ndarray] = OrderedDict()
        self._sizes: dict[bytes, Size] = {}  # full sizes, kept as long as the pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def whole_size(self, digest: bytes) -> Size | None:
        """The image's full size, if it is in the cache at any size."""
        return self._sizes.get(digest)

    def find(self, digest: bytes, target: Size) -> np.ndarray | None:
        pixels = self._pixels.get((digest, target))
        if pixels is None:
            self.misses += 1
        else:
            self.hits += 1
            self._pixels.move_to_end((digest, target))
        return pixels

    def keep(self, digest: bytes, whole: Size, target: Size, pixels: np.ndarray) -> None:
        if pixels.nbytes > self.max_bytes:
            return
        self._pixels[digest, target] = pixels
        self._sizes[digest] = whole
        self.num_bytes += pixels.nbytes
        while self.num_bytes > self.max_bytes:
            (oldest, _), dropped = self._pixels.popitem(last=False)
            self.num_bytes -= dropped.nbytes
            if oldest != digest:
                self._sizes.pop(oldest, None)


class LazyImage:
    """One image of a prompt; it is not decoded if the cache holds it.

    Args:
        source: an image, a path, or encoded bytes.
        owner: the sample's id, for errors.
        root: the folder that files must be in; None allows any.

    Attributes:
        size: height and width in pixels, upright.

    Raises:
        UserError: the image is missing or broken; see `load_image`.
    """

    def __init__(self, source: ImageSource, owner: str, cache: ImageCache, root: Path | None = None) -> None:
        self._source, self._owner, self._cache, self._root = source, owner, cache, root
        self._encoded: bytes | None = None
        self._image: Image.Image | None = None
        self._digest = b""
        size = None
        if not cache.max_bytes or isinstance(source, Image.Image):
            self._image = load_image(source, owner, root=root)
            if cache.max_bytes:  # hash upright RGB pixels, after modes, palettes and orientation
                shape = repr(self._image.size).encode()
                self._digest = blake2b(
                    shape + self._image.tobytes(), digest_size=32, person=b"pixels"
                ).digest()
        else:
            self._encoded = read_image(source, owner, root)
            self._digest = blake2b(self._encoded, digest_size=32).digest()
            size = cache.whole_size(self._digest)
        if size is None:
            image = self._whole()
            size = image.height, image.width
        self.size: Size = size

    def resized(self, target: Size, resample: int) -> np.ndarray:
        """[height, width, 3] uint8, read-only; the same bits with or without the cache."""
        if self._cache.max_bytes and (kept := self._cache.find(self._digest, target)) is not None:
            return kept
        height, width = target
        pixels = np.asarray(self._whole().resize((width, height), Image.Resampling(resample)))
        if self._cache.max_bytes:
            self._cache.keep(self._digest, self.size, target, pixels)
        return pixels

    def _whole(self) -> Image.Image:
        if self._image is None:
            self._image = load_image(self._source, self._owner, self._encoded, self._root)
        return self._image


def fitted(whole: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size at which the model sees an image: multiples of `factor`, within the pixel limits.

    Raises:
        ValueError: the image is more than 200 times as long as wide.
    """
    height, width = smart_resize(*whole, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return height, width


def num_tokens(target: Size, factor: int) -> int:
    return target[0] * target[1] // factor**2


def shrunk(whole: Sequence[Size], targets: Sequence[Size], factor: int, max_tokens: int) -> list[Size] | None:
    """Scale all images of a prompt by the same factor until their tokens fit.

    Args:
        whole: full sizes of the images.
        targets: their sizes without a token limit; no image gets larger than this.
        factor: side of one token in pixels; the returned sides are multiples of it.
        max_tokens: limit on the tokens of all images together.

    Returns:
        The largest sizes that fit; None if even one token per image is too much.
    """

    def side(length: int, scale: float, most: int) -> int:
        return min(most, max(factor, int(length * scale / factor) * factor))

    def sizes(step: int) -> list[Size]:
        # Like `smart_resize`, except that it lengthens narrow images when it shrinks them.
        found = []
        for (height, width), (most_high, most_wide) in zip(whole, targets, strict=True):
            scale = math.sqrt(most_high * most_wide * step / SHRINK_STEPS / (height * width))
            found.append((side(height, scale, most_high), side(width, scale, most_wide)))
        return found

    def tokens(step: int) -> int:  # never falls as the step rises
        return sum(num_tokens(size, factor) for size in sizes(step))

    step = bisect_right(range(SHRINK_STEPS), max_tokens, key=tokens) - 1
    return None if step < 0 else sizes(step)
