"""Helpers for the tests of loading, in a module that worker processes import too; and a run to be killed."""

import json
import os
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

from geo_r1.data import PromptEncoder, PromptLoader, Sample, World
from geo_r1.data.exemplars import Numbered, question
from geo_r1.data.source import Source
from geo_r1.models.tiny import SPECIAL_TOKENS, build_tiny

IMAGE = SPECIAL_TOKENS.index("<|image_pad|>")


class CountingEncoder(PromptEncoder):
    """Reports the hits and misses of its cache in place of a sample's name."""

    def encode(self, sample):
        prompt = super().encode(sample)
        return replace(prompt, sample_id=f"{self.cache.hits} hits, {self.cache.misses} misses")


def encoder(kind=PromptEncoder, **options):
    _, tokenizer, image_processor = build_tiny(["where is it, north or south?"], hidden_size=64, num_layers=1)
    return kind(tokenizer, image_processor, IMAGE, **options)


def sample(name, *images, text="where is it?"):
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
    return Sample(name, ({"role": "user", "content": content},), images)


def deadly(victim, index):
    """A sample that kills the process that draws it, once its number is that of the victim."""
    if index == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(str(index))


def deadly_source(victim):
    return Source(partial(deadly, victim), None)


def killed_run():
    """Survive signals to the whole group, report them and the workers' parents, and be killed."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(int(number)))
    source = Source(Numbered(question, World(num_candidates=3), "train"), None)
    loader = PromptLoader(source, encoder(), seed=0, num_workers=2)
    loader.load([0, 1], [[2, 3]])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.killpg(0, number)
    ids = [sample.id for sample, _ in loader.load([2, 3, 4], [[5, 6]])]
    workers = [child.pid for child in active_children()]
    parents = [re.search(r"PPid:\s(\d+)", Path(f"/proc/{pid}/status").read_text())[1] for pid in workers]
    served = ["forkserver" in Path(f"/proc/{pid}/cmdline").read_text() for pid in parents]
    print(json.dumps([received, ids, workers, served]), flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
