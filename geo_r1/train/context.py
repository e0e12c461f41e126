"""The run context: what every stage of a run uses besides its policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_r1.data import PromptEncoder
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.report.log import Log
from geo_r1.train.state.checkpoint import save_folder


@dataclass
class RunContext:
    """What every stage of a run uses besides its policy: recipe, ranks, folder, log, tokenizer."""

    recipe: Recipe
    ranks: Ranks
    run_dir: Path
    log: Log
    tokenizer: Any
    image_processor: Any
    encoder: PromptEncoder

    def export(self, folder: Path, policy: Policy) -> None:
        """Write the policy as a transformers folder, on the main rank; the others take part, and wait."""
        with policy.exported() as model:
            if model is not None:
                save_folder(folder, model, [self.tokenizer, self.image_processor])
        self.ranks.barrier()
