"""Sections of a recipe about the run: folder, ranks, model, data, rewards, evaluation, log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

STAGES = ("pretrain", "sft", "grpo", "eval")
Stage = Literal["pretrain", "sft", "grpo", "eval"]
PositiveInt = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

T = TypeVar("T")
# A key or section that may change when a run goes on in its folder: it decides speed, memory, what is shown
# or which model is kept, not what is learned. `recipe.load.decisive` leaves it out.
Free = Annotated[T, Field(json_schema_extra={"free": True})]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def check_readers(self, readers: Mapping[str, tuple[bool, str]]) -> None:
        """Refuse a key that has been set although nothing reads it.

        Args:
            readers: by key, whether anything reads it, and what would.
        """
        for key, (is_read, reader) in readers.items():
            if not is_read and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for {reader}")


class RunConfig(Section):
    """The run's folder and its stages."""

    dir: Free[Path] = Path("runs/world")
    """Folder of the run. A run continues there if its recipe is the same, but for keys with ↻ and for steps
    or epochs that have grown."""
    seed: int = 0
    """Seed of the sample order, the completions and every weight that is drawn."""
    stages: Free[tuple[Stage, ...]] = ("sft", "grpo", "eval")
    """In order: pretrain, sft, grpo, eval. A stage starts from the newest model of the stages before it."""
    overwrite: Free[bool] = False
    """Delete what an earlier run wrote into the folder, and start again."""
    threads: Free[Natural] = 0
    """CPU threads per rank; 0 takes OMP_NUM_THREADS, or else shares out the cores that the process may use.
    A model as small as the world's own runs on one thread."""
    keep_checkpoints: Free[PositiveInt] = 2
    """Number of a stage's newest checkpoints to keep, besides the best one where `eval.keep_best` is set. Of
    a finished stage the last one stays, until a later stage begins."""
    max_bad_steps: Free[Natural] = 10
    """A step whose loss or gradient is not finite is skipped, and its batch is kept under bad/. The run ends
    after more than this many in a stage."""
    hang_timeout: Free[Positive] = 600.0
    """Seconds without a sign of life from another rank, or without an answer from a process that prepares
    prompts, after which the run ends."""


class ParallelConfig(Section):
    """How the model is spread over the ranks."""

    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """`ddp` keeps a whole model on each rank; `fsdp2` and `deepspeed` shard weights, gradients and optimiser
    state. `auto` is ddp on one rank and fsdp2 on several."""
    shard_size: PositiveInt | None = None
    """fsdp2: number of ranks that share one copy of the weights; the copies average their gradients (HSDP).
    The ranks of one node are a good choice. By default all ranks share one copy."""
    reshard_after_forward: bool = True
    """fsdp2: free a layer's whole weights after its forward, and gather them again for its backward."""
    cpu_offload: bool = False
    """fsdp2, deepspeed: keep shards and optimiser state in host memory."""
    zero_stage: Annotated[int, Field(ge=2, le=3)] = 3
    """deepspeed: 2 shards gradients and optimiser state, 3 the weights too."""
    deepspeed_config: Path | None = None
    """deepspeed: a JSON file of your own. It must not set what the recipe decides: batch, precision, stage,
    optimiser, clipping."""

    @model_validator(mode="after")
    def _read_by_its_strategy(self) -> ParallelConfig:
        readers = {
            "shard_size": ("auto", "fsdp2"),
            "cpu_offload": ("auto", "fsdp2", "deepspeed"),
            "deepspeed_config": ("deepspeed",),
        }
        self.check_readers({
            key: (self.strategy in names, f"strategy = {' or '.join(names)}, not {self.strategy}")
            for key, names in readers.items()
        })  # fmt: skip
        return self


class ModelConfig(Section):
    """The model that is trained."""

    path: str = "tiny"
    """Folder or hub name of a Qwen2-VL, Qwen2.5-VL or dense Qwen3-VL. `tiny` builds a small random one for
    the world."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype that layers compute in. With bfloat16, trained weights and optimiser state stay float32 unless
    `optim.optimizer` says otherwise."""
    export_dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Dtype of the weights of exported models, from which the next stage starts. `base` is that of `path`, or
    float64 where layers compute in it."""
    checkpointing: Free[Literal["none", "selective", "full"]] = "none"
    """What backward recomputes instead of keeping it: nothing; all of a layer except its attention and every
    second product; or all of it."""
    offload_activations: Free[bool] = False
    """Keep in host memory what forward saves for backward."""
    compile: Free[bool] = False
    """Compile each layer with torch.compile."""
    liger: Free[bool] = True
    """Let liger-kernel compute norms, SwiGLU and rotary positions, if it is installed and the model is on a
    GPU."""


class LoraConfig(Section):
    """Low-rank adapters on frozen weights, from peft. Only they are trained and checkpointed."""

    rank: Natural = 0
    """Rank of an adapter; 0 trains the weights themselves."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on an adapter's input during supervised fine-tuning. GRPO uses none: it would make the ratios
    random."""
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip
    """Linear layers of the text model that get an adapter."""
    vision: bool = False
    """Add adapters to the linear layers of the vision tower as well."""


class DataConfig(Section):
    """Settings for the data of every stage."""

    image_root: Path | None = None
    """Image paths are relative to this folder; by default, to the data file's."""
    max_pixels: PositiveInt | None = None
    """Larger images are shrunk to this many pixels."""
    max_prompt_tokens: PositiveInt | None = None
    """The most tokens a prompt may have. Prompts are never cut."""
    on_overlong: Literal["error", "skip", "resize"] = "error"
    """What a longer prompt does: it ends the run, is left out of its step, or has its images shrunk until
    it fits."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What a bad sample does (a malformed row; an image that is missing, broken, too large or too narrow): it
    ends the run, or is left out and counted. The start of a run looks at every row and at the header of every
    image; `python -m geo_r1.data check` decodes them all."""
    max_bad_share: Free[Share] = 0.01
    """With on_bad_sample = "skip", a run ends if more than this share of a file's samples is bad."""
    num_workers: Free[Natural] = 0
    """Processes per rank that decode and encode prompts ahead; 0 does so in the rank itself."""
    cache_mib: Free[Natural] = 0
    """Memory per rank for decoded images, looked up by content; 0 keeps none."""
    curriculum: bool = False
    """Go through the first epoch of a file from easy to hard, by its column `difficulty`."""

    @model_validator(mode="after")
    def _read_by_its_rule(self) -> DataConfig:
        self.check_readers({"max_bad_share": (self.on_bad_sample == "skip", 'on_bad_sample = "skip"')})
        return self


class WorldConfig(Section):
    """The procedural world (data = "world")."""

    seed: int = 0
    """Seed of its cities."""
    num_train_cities: PositiveInt = 64
    """Number of cities in training questions."""
    num_test_cities: PositiveInt = 16
    """Number of cities in held-out questions; none of them is a training city."""
    num_candidates: Annotated[int, Field(ge=3, le=10)] = 5
    """Tiles per question: the right one and the wrong ones (confusers)."""
    confusers: Literal["same_city", "anywhere"] = "same_city"
    """Where the wrong tiles come from."""
    difficulty: Share = 0.8
    """Share of its other sides that a confuser has in common with the right tile."""
    curriculum_start: Share | None = None
    """Difficulty at which GRPO starts; it rises evenly to `difficulty`."""
    curriculum_samples: PositiveInt = 1000
    """Number of prompts over which the difficulty rises."""
    response: Literal["chain_of_thought", "answer"] = "chain_of_thought"
    """What fine-tuning teaches: a chain of thought with its answer, or the answer alone."""
    careless: Share = 0.0
    """Share of the teacher's chains of thought that call every side they compare the same."""
    slip: Share = 0.0
    """How often the teacher misnames a side of a tile."""


class RewardConfig(Section):
    """How completions are rewarded."""

    functions: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "accuracy", "format", "length", "repetition"
    )  # fmt: skip
    """Names in the registry, or module:function for your own with TRL's signature."""
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    """By function; the default is 1."""
    options: dict[str, dict[str, Any]] = {}
    """By function: keyword arguments."""
    timeout: Free[NotNegative] = 600.0
    """Seconds that a call of a function may take, and all `async def` functions of a step together; 0 sets
    no limit."""

    @model_validator(mode="after")
    def _once_each(self) -> RewardConfig:
        if len(set(self.functions)) < len(self.functions):
            raise ValueError("functions names a function twice")
        return self


class EvalConfig(Section):
    """Cross-view pairing on held-out samples, with greedy decoding."""

    data: str = "world"
    """`world`, or a JSONL or parquet file."""
    num_samples: Natural = 500
    """Number of samples, from the first; 0 takes all of a file."""
    max_new_tokens: PositiveInt = 256
    """A completion that reaches this length is cut off."""
    max_tokens: PositiveInt = 65536
    """Tokens cached at a time."""
    gallery: Natural = 12
    """Samples that the report shows."""
    every: Natural = 0
    """Steps between evaluations of a model in training; 0 evaluates finished stages only."""
    every_num_samples: Natural = 0
    """Samples of an evaluation in training; 0 takes num_samples."""
    keep_best: bool = False
    """Export the model that was most accurate in these evaluations, not the last one."""

    @model_validator(mode="after")
    def _finite(self) -> EvalConfig:
        if self.data == "world" and not self.num_samples:
            raise ValueError("the world never ends: set num_samples")
        if self.keep_best and not self.every:
            raise ValueError("keep_best needs evaluations during training: set every")
        return self


class LogConfig(Section):
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files into the run's folder."""
    rollouts_every: Natural = 50
    """Steps between records of GRPO's completions, with images and rewards, in rollouts/ and the report.
    The first step is always recorded; 0 records none."""
    rollouts_prompts: PositiveInt = 4
    """Prompts recorded per logged step."""
    wandb: bool = False
    """Send figures to Weights & Biases."""
    project: str = "geo_r1"
    """W&B project."""
