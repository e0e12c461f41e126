"""Read and write the rows of other trainers."""

from geo_r1.data.formats.known import FORMATS, detect

__all__ = ["FORMATS", "detect"]
