"""Everything that decides a run, section by section: typed, checked once, then frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

STAGES = ("pretrain", "sft", "grpo", "eval")
Stage = Literal["pretrain", "sft", "grpo", "eval"]
PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Section):
    """Where a run lives and what it does."""

    dir: Path = Path("runs/world")
    """Folder of the run; it continues there if the recipe is the same."""
    seed: int = 0
    stages: tuple[Stage, ...] = ("sft", "grpo", "eval")
    """In order: pretrain, sft, grpo, eval. A stage starts from the newest model of those before it."""
    overwrite: bool = False
    """Delete what the folder holds and start anew."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads a rank; 0 shares the machine's cores among its ranks."""


class ModelConfig(Section):
    """The policy."""

    path: str = "tiny"
    """A folder or hub name of a Qwen2-VL or Qwen2.5-VL; `tiny` builds a small random one for the world."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What layers compute in. Under bfloat16 the weights and the optimiser's state stay float32."""
    gradient_checkpointing: bool = False
    """Recompute layers in backward instead of keeping their activations."""
    liger: bool = True
    """Norms, SwiGLU and rotary positions by liger-kernel, where it is installed and the model is on a GPU."""


class DataConfig(Section):
    """What holds for every stage's data."""

    image_root: Path | None = None
    """Image paths are relative to this folder; without it, to the data file."""
    max_pixels: PositiveInt | None = None
    """Larger images are shrunk to this many pixels."""
    max_prompt_tokens: PositiveInt | None = None
    """A longer prompt is an error; nothing is ever cut."""


class WorldConfig(Section):
    """The procedural world (data = "world")."""

    seed: int = 0
    num_train_cities: PositiveInt = 64
    num_test_cities: PositiveInt = 16
    num_candidates: Annotated[int, Field(ge=3, le=10)] = 5
    confusers: Literal["same_city", "anywhere"] = "same_city"
    difficulty: Share = 0.8
    """Share of its other sides that a confuser has in common with the truth."""
    careless: Share = 0.0
    """Share of the teacher's chains of thought that call every side they compare the same."""
    slip: Share = 0.0
    """How often the teacher misnames a side of a tile."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After warm-up: stay, or fall towards `min_lr_ratio` of lr; the step after the last would reach it."""
    warmup_ratio: Share = 0.0
    """Share of the steps over which the rate rises from zero."""
    min_lr_ratio: Share = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: PositiveInt = 16384
    """Tokens a packed micro-batch; more are accumulated, with the same gradient."""


class Duration(Section):
    """How long a stage runs: exactly one of steps and epochs. The world has no epochs."""

    data: str = "world"
    """`world`, or a JSONL or parquet file."""
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    freeze_vision: bool = False
    """Keep the vision tower and its projector as they are."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _one_duration(self) -> Duration:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        if self.data == "world" and self.steps is None:
            raise ValueError("the world never ends: set steps, not epochs")
        return self


class SFTConfig(Duration):
    """Supervised fine-tuning on responses."""

    batch_size: PositiveInt = 32
    """Samples a step, over all ranks."""
    optim: OptimConfig = OptimConfig()


class LossConfig(Section):
    """GRPO's token loss; names as in TRL."""

    type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    """How tokens are averaged."""
    policy: Literal["clip", "cispo", "sapo"] = "clip"
    epsilon: Annotated[float, Field(ge=0)] = 0.2
    epsilon_high: Annotated[float, Field(ge=0)] | None = None
    delta: Annotated[float, Field(gt=0)] | None = None
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    importance_sampling_level: Literal["token", "sequence"] = "token"
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the model that the stage started from; it is held only where beta > 0."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0


class AdvantageConfig(Section):
    """How a completion is scored against its group."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"
    eps: Annotated[float, Field(gt=0)] = 1e-4


class GRPOOptimConfig(OptimConfig):
    """AdamW and its schedule; reinforcement learning takes smaller steps."""

    lr: Annotated[float, Field(gt=0)] = 1e-6


class GRPOConfig(Duration):
    """Group relative policy optimisation."""

    prompts_per_step: PositiveInt = 8
    """Groups a step, over all ranks."""
    num_completions: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt: M."""
    num_iterations: PositiveInt = 1
    """Updates from one batch of completions."""
    loss: LossConfig = LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    optim: GRPOOptimConfig = GRPOOptimConfig()


class RolloutConfig(Section):
    """Sampling of completions for GRPO."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 65536
    """Cached tokens at a time; more prompts are sampled in turns, with the same result."""


class RewardConfig(Section):
    """What a completion earns."""

    functions: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "accuracy",
        "format",
        "length",
        "repetition",
    )
    """Registry keys, or module:function of your own with TRL's signature."""
    weights: dict[str, float] = {}
    """By function; 1 where not given."""
    options: dict[str, dict[str, Any]] = {}
    """By function: keyword arguments."""


class EvalConfig(Section):
    """Cross-view pairing on held-out samples, greedy."""

    data: str = "world"
    num_samples: Annotated[int, Field(ge=0)] = 500
    """The first so many; 0 takes all of a file."""
    max_new_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 65536
    """Cached tokens at a time."""
    gallery: Annotated[int, Field(ge=0)] = 12
    """Samples that the report shows."""

    @model_validator(mode="after")
    def _finite(self) -> EvalConfig:
        if self.data == "world" and not self.num_samples:
            raise ValueError("the world never ends: set num_samples")
        return self


class LogConfig(Section):
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: bool = False
    project: str = "geo_r1"
    """W&B project."""


class Recipe(BaseSettings):
    """Everything that decides a run."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, cli_avoid_json=True
    )

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    pretrain: SFTConfig = SFTConfig(steps=100)
    sft: SFTConfig = SFTConfig(steps=100)
    grpo: GRPOConfig = GRPOConfig(steps=100)
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, *_, **__):
        """Only what `load_recipe` hands over: no environment variables, no files found by chance."""
        return (init_settings,)

    @model_validator(mode="after")
    def _stages_in_order(self) -> Recipe:
        order = [STAGES.index(stage) for stage in self.run.stages]
        if not order or order != sorted(set(order)):
            found = ", ".join(self.run.stages) or "none"
            raise ValueError(
                f"run.stages must be some of {', '.join(STAGES)}, in this order, each once; got {found}"
            )
        return self
