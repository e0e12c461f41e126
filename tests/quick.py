"""What takes a third off the time of a small run and changes nothing in it."""

import gc
import sys


def quicken():
    """Let collections of garbage pass over all that is there by now, and logs over configurations.

    A run collects garbage after each stage, through all of torch and transformers: a quarter of a second.
    transformers writes each configuration that it reads into a line of a log that nobody sees.
    """
    gc.collect()
    gc.freeze()
    if transformers := sys.modules.get("transformers"):
        transformers.PretrainedConfig.__repr__ = object.__repr__
