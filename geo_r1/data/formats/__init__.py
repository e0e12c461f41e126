"""Rows of other trainers, read and written."""

from geo_r1.data.formats.known import FORMATS, detect

__all__ = ["FORMATS", "detect"]
