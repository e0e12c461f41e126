"""The run context: what every stage of a run uses besides its policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geo_r1.data import PromptEncoder, PromptLoader
from geo_r1.data.source import Source
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.report.log import Log
from geo_r1.train.state.export import export_model, model_card


@dataclass
class RunContext:
    """What every stage of a run uses besides its policy: recipe, ranks, folder, log, tokenizer.

    Attributes:
        image_processor: as the model's folder has it; `encoder.image_processor` has the recipe's limits.
        export_dtype: of the weights of exported models.
    """

    recipe: Recipe
    ranks: Ranks
    run_dir: Path
    log: Log
    tokenizer: Any
    image_processor: Any
    encoder: PromptEncoder
    export_dtype: torch.dtype

    def loader(self, source: Source) -> PromptLoader:
        """Loads a source's prompts as the recipe asks; close it."""
        data, run = self.recipe.data, self.recipe.run
        return PromptLoader(
            source,
            self.encoder,
            seed=run.seed,
            num_workers=data.num_workers,
            cache_bytes=data.cache_mib << 20,
            timeout=run.hang_timeout,
        )

    def export(self, stage: str, policy: Policy) -> None:
        """Write the policy as the model of a stage, on the main rank; the others take part, and wait.

        Raises:
            UserError: it cannot be written, or has weights that are not finite; on every rank.
        """
        folder, companions = self.run_dir / "models" / stage, [self.tokenizer, self.image_processor]
        with policy.exported(self.export_dtype) as model, self.ranks.together():
            if model is not None:
                texts = {"README.md": model_card(self.recipe, stage, folder)}
                export_model(folder, model, companions, self.recipe.model.path, texts)
