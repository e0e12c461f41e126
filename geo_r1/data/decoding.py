"""Images of samples: files opened with care, checked by their headers, decoded to RGB.

Rows name files, and nobody has read all rows: a name may lead anywhere, and a small file may hold a huge
image.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from geo_r1.errors import UserError, one_line

ImageSource = Image.Image | Path | bytes

# Pixels of an image: 256 MiB as RGB, and decoding holds two or three copies. A PNG of 200 KB can hold twice
# as many.
MAX_PIXELS = 89_478_485  # Pillow's own limit, which it only warns of
MAX_RATIO = 200  # of an image's sides: `smart_resize` of Qwen's processors refuses more
MAX_BYTES = 2**29  # of an encoded image: at 8 bits, an uncompressed one with MAX_PIXELS takes less
# Photographs and tiles. Pillow knows more: some run programs (EPS) or are broken in new ways (DDS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

KINDS = {  # of files that hold no image
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_check_header` refuses these


class ImageError(UserError):
    """An image that cannot be used.

    Args:
        owner: names the sample.
        name: the file, or "of N bytes".
        kind: what is wrong, the same words for the same fault: "does not exist".
        detail: what was found, and what would work.
    """

    def __init__(self, owner: str, name: str, kind: str, detail: str = "") -> None:
        super().__init__(owner, name, kind, detail)  # so that it pickles
        self.kind = kind
        self.reason = f"image {name} {kind}{detail and ': '}{shortened(one_line(detail))}"
        self.owner = owner

    def __str__(self) -> str:
        return f"sample {self.owner}: {self.reason}"


class _Fault(Exception):  # noqa: N818  # becomes an ImageError
    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind, self.detail = kind, detail


def load_image(
    source: ImageSource, owner: str, encoded: bytes | None = None, root: Path | None = None
) -> Image.Image:
    """Decode an image to RGB, rotated upright by its EXIF orientation, transparent pixels over white.

    Args:
        owner: the sample's id, for errors.
        encoded: the bytes of this source, if `read_image` has already read them.
        root: the folder that files must be in, after links; None allows any.

    Raises:
        ImageError: the file is missing, is outside `root`, is not a complete image, has over `MAX_PIXELS`
            pixels, or more than 8 bits per channel; names `owner` and the file.
    """
    with _naming(source, owner):
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with _opened(source if encoded is None else encoded, root) as image:
            return _upright_rgb(image)


def read_image(source: Path | bytes, owner: str, root: Path | None = None) -> bytes:
    """The encoded bytes of an image; raises an ImageError as `load_image` does, but does not decode."""
    with _naming(source, owner):
        if isinstance(source, bytes):
            return source
        with _file(source, root) as file:
            return file.read()


def check_image(source: ImageSource, owner: str, root: Path | None = None, *, whole: bool = False) -> None:
    """Check that a model can be shown an image, by its header alone.

    Args:
        whole: decode it, which finds truncated images.

    Raises:
        ImageError: as `load_image` does; or one side is over `MAX_RATIO` times as long as the other.
    """
    with _naming(source, owner):
        if isinstance(source, Image.Image):
            size = source.size
        else:
            with _opened(source, root) as image:
                size = image.size
                if whole:
                    image.draft(None, (1, 1))  # a JPEG is read to its end, but only small pixels are computed
                    image.load()
        if max(size) > MAX_RATIO * min(size):
            raise _Fault("is too narrow", f"{size[0]} x {size[1]}; a side may be {MAX_RATIO} times the other")


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """A smaller copy of an image, of about the same shape, with at most `max_pixels` pixels."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    height = min(max(1, int(image.height * scale)), max_pixels)
    width = min(max(1, int(image.width * scale)), max_pixels // height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@contextmanager
def _naming(source: ImageSource, owner: str) -> Iterator[None]:
    """Turn an error about an image into one line that names its sample."""
    if isinstance(source, Image.Image):
        name = "in memory"
    else:
        name = shortened(one_line(source)) if isinstance(source, Path) else f"of {len(source)} bytes"
    try:
        yield
    except _Fault as fault:
        raise ImageError(owner, name, fault.kind, fault.detail) from None
    except FileNotFoundError:
        raise ImageError(owner, name, "does not exist") from None
    except UnidentifiedImageError:
        known = "AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP are read"
        raise ImageError(owner, name, "is in no known image format", known) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(owner, name, *_TOO_LARGE) from None
    except MemoryError:
        raise
    except Exception as error:
        # Only the operating system and Pillow run in this block. Pillow's decoders raise whatever a damaged
        # file leads them to: IndexError, KeyError, RuntimeError, ZeroDivisionError, ...
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(owner, name, "cannot be read", detail) from error


def shortened(text: str, most: int = 200) -> str:
    """A text that fits in an error; a long one loses its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


_TOO_LARGE = "has too many pixels", f"over {MAX_PIXELS:,}; shrink it"


@contextmanager
def _opened(source: Path | bytes, root: Path | None) -> Iterator[Image.Image]:
    """An image whose header has been checked, and which is not decoded yet."""
    if isinstance(source, bytes):
        if len(source) > MAX_BYTES:
            raise _Fault("is too large", f"{len(source):,} bytes; at most {MAX_BYTES:,}")
        with Image.open(io.BytesIO(source), formats=_formats()) as image:
            _check_header(image)
            yield image
    else:
        with _file(source, root) as file, Image.open(file, formats=_formats()) as image:
            _check_header(image)
            yield image


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF


def _check_header(image: Image.Image) -> None:
    if not image.width or not image.height:
        raise _Fault("has no pixels", f"{image.width} x {image.height}")
    if image.width * image.height > MAX_PIXELS:
        raise _Fault(*_TOO_LARGE)
    _check_depth(image)


def _check_depth(image: Image.Image) -> None:
    if image.mode[0] in "IF":  # Pillow would clip these to 0..255: a 16-bit satellite tile would turn white
        raise _Fault("has more than 8 bits a channel", f"mode {image.mode}; convert it to 8")


def _file(path: Path, root: Path | None) -> IO[bytes]:
    """Open a regular file for reading, without waiting for a pipe or starting a device."""
    if root is not None:
        path = Path(os.path.realpath(path))
        if not path.is_relative_to(_real(root)):
            raise _Fault("leads outside the root", f"only files in {shortened(one_line(root))} are read")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Fault("is not a file", KINDS.get(stat.S_IFMT(status.st_mode), "something else"))
        if status.st_size > MAX_BYTES:
            raise _Fault("is too large", f"{status.st_size:,} bytes; at most {MAX_BYTES:,}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@cache
def _real(root: Path) -> str:
    return os.path.realpath(root)


def _upright_rgb(image: Image.Image) -> Image.Image:
    _check_depth(image)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:  # transparent pixels have arbitrary colours
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
