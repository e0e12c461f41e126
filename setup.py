"""Everything static is in pyproject.toml; this file is where the CUDA extension of csrc/ will be declared."""

from setuptools import setup

setup()
