"""Everything that decides a run, section by section: typed, checked once, then frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

STAGES = ("pretrain", "sft", "grpo", "eval")
Stage = Literal["pretrain", "sft", "grpo", "eval"]
PositiveInt = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Literal["vision", "projector", "text"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Section):
    """Where a run lives and what it does."""

    dir: Path = Path("runs/world")
    """Folder of the run; it continues there if the recipe is the same."""
    seed: int = 0
    """Of the order of samples, of completions, and of all weights that are drawn."""
    stages: tuple[Stage, ...] = ("sft", "grpo", "eval")
    """In order: pretrain, sft, grpo, eval. A stage starts from the newest model of those before it."""
    overwrite: bool = False
    """Delete what the folder holds and start anew."""
    threads: Natural = 0
    """CPU threads a rank; 0 shares the machine's cores among its ranks."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints of a stage that stay on disk; one that `eval.keep_best` names stays besides."""
    max_bad_steps: Natural = 10
    """A step whose loss or gradient is not finite is skipped and its batch kept under bad/; one more than
    this many in a stage ends the run."""


class ParallelConfig(Section):
    """How the model is spread over the ranks."""

    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """`ddp`: a whole model on each; `fsdp2`, `deepspeed`: weights, gradients and optimiser in shards. `auto`
    is fsdp2 above one rank."""
    shard_size: PositiveInt | None = None
    """fsdp2: ranks that share one copy of the weights; the copies then average their gradients (HSDP). Best
    is the ranks of one node. Without it, all ranks share one copy."""
    reshard_after_forward: bool = True
    """fsdp2: free a layer's whole weights after its forward, and gather them again for its backward."""
    cpu_offload: bool = False
    """fsdp2, deepspeed: shards and optimiser live in host memory."""
    zero_stage: Annotated[int, Field(ge=2, le=3)] = 3
    """deepspeed: 2 shards gradients and optimiser, 3 the weights too."""
    deepspeed_config: Path | None = None
    """deepspeed: a JSON of your own; what the recipe decides (batch, precision, stage, optimiser, clipping)
    may not be in it."""

    @model_validator(mode="after")
    def _read_by_its_strategy(self) -> ParallelConfig:
        readers = {
            "shard_size": ("auto", "fsdp2"),
            "cpu_offload": ("auto", "fsdp2", "deepspeed"),
            "deepspeed_config": ("deepspeed",),
        }
        for key, strategies in readers.items():
            if getattr(self, key) and self.strategy not in strategies:
                raise ValueError(f"{key} is for strategy = {' or '.join(strategies)}, not {self.strategy}")
        return self


class ModelConfig(Section):
    """The policy."""

    path: str = "tiny"
    """A folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL (dense); `tiny` builds a small random one
    for the world."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What layers compute in. Under bfloat16 trained weights and the optimiser's state stay float32, unless
    `optim.optimizer` says otherwise."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward recomputes instead of keeping it: nothing, all of a layer but its attention and every
    second product, or all of it."""
    offload_activations: bool = False
    """Keep what forward saves for backward in host memory."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    liger: bool = True
    """Norms, SwiGLU and rotary positions by liger-kernel, where it is installed and the model is on a GPU."""


class LoraConfig(Section):
    """Low-rank adapters on frozen weights, by peft; they alone are trained and checkpointed."""

    rank: Natural = 0
    """Columns of an adapter; 0 trains the weights themselves."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """An adapter's product counts alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of an adapter's input in supervised fine-tuning; in GRPO it would make the ratios random, and is 0."""
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers of the text model that get one."""
    vision: bool = False
    """Adapters on the linear layers of the vision tower, too."""


class DataConfig(Section):
    """What holds for every stage's data."""

    image_root: Path | None = None
    """Image paths are relative to this folder; without it, to the data file."""
    max_pixels: PositiveInt | None = None
    """Larger images are shrunk to this many pixels."""
    max_prompt_tokens: PositiveInt | None = None
    """The most tokens a prompt may have; nothing is ever cut."""
    on_overlong: Literal["error", "skip", "resize"] = "error"
    """A longer prompt ends the run, is left out of its step, or has its pictures shrunk until it fits."""
    num_workers: Natural = 0
    """Processes a rank that decode and encode ahead; 0 does it in the rank itself."""
    cache_mib: Natural = 0
    """Memory a rank for decoded pictures, found again by their content; 0 keeps none."""
    curriculum: bool = False
    """The first epoch of a file goes from easy to hard by its column `difficulty`."""


class WorldConfig(Section):
    """The procedural world (data = "world")."""

    seed: int = 0
    """Of its cities."""
    num_train_cities: PositiveInt = 64
    """Cities of the training questions."""
    num_test_cities: PositiveInt = 16
    """Cities of the held-out questions, others than those."""
    num_candidates: Annotated[int, Field(ge=3, le=10)] = 5
    """Tiles a question: the right one and its confusers."""
    confusers: Literal["same_city", "anywhere"] = "same_city"
    """Where the wrong tiles are from."""
    difficulty: Share = 0.8
    """Share of its other sides that a confuser has in common with the truth."""
    curriculum_start: Share | None = None
    """Where GRPO's difficulty starts; it rises evenly to `difficulty`."""
    curriculum_samples: PositiveInt = 1000
    """Prompts over which it rises."""
    response: Literal["chain_of_thought", "answer"] = "chain_of_thought"
    """What fine-tuning learns to say: a chain of thought with its answer, or the answer alone."""
    careless: Share = 0.0
    """Share of the teacher's chains of thought that call every side they compare the same."""
    slip: Share = 0.0
    """How often the teacher misnames a side of a tile."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"] = "adamw"
    """torch's own, or torchao's: its state in 8 bits, or weights and state in bfloat16 with stochastic
    rounding."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate, at its highest."""
    vision_lr: Annotated[float, Field(gt=0)] | None = None
    """The vision tower's and its projector's own rate, on the same schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After warm-up: stay, or fall towards `min_lr_ratio` of lr; the step after the last would reach it."""
    warmup_ratio: Share = 0.0
    """Share of the steps over which the rate rises from zero."""
    min_lr_ratio: Share = 0.0
    """What `schedule` falls to, as a share of lr."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of Adam's averages of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled: a step takes lr times this share off every weight."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A longer gradient is scaled to this norm."""
    max_tokens: PositiveInt = 16384
    """Tokens a packed micro-batch; more are accumulated, with the same gradient."""


class Duration(Section):
    """How long a stage runs: exactly one of steps and epochs. The world has no epochs."""

    data: str = "world"
    """`world`, or a JSONL or parquet file."""
    steps: PositiveInt | None = None
    """Steps of the stage; or set epochs. A recipe with this section sets exactly one of them."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, rounded to whole steps; or set steps."""
    freeze: tuple[Part, ...] = ()
    """Parts that stay as they are: the vision tower, its projector, the text model with its head."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _one_duration(self) -> Duration:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"set exactly one of steps and epochs; {'both' if self.steps else 'neither'} is set"
            )
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
    """The policy term: clipped PPO, CISPO (arXiv:2506.13585) or SAPO (arXiv:2511.20347)."""
    epsilon: Annotated[float, Field(ge=0)] = 0.2
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: Annotated[float, Field(ge=0)] | None = None
    """It is clipped above 1 + epsilon_high; without it, 1 + epsilon."""
    delta: Annotated[float, Field(gt=0)] | None = None
    """A bound above on the ratio where the advantage is negative, too."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """SAPO's temperature for positive advantages."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """SAPO's temperature for negative ones."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or of whole completions (GSPO)."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL is estimated from the sampled tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


class AdvantageConfig(Section):
    """How a completion is scored against its group."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: its group's mean, or that of the others in it."""
    scale: Literal["group", "batch", "none"] = "group"
    """What the difference is divided by: the group's deviation, the step's, or nothing."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to that deviation."""


class ReferenceConfig(Section):
    """The model that the KL is measured against; it is held only where loss.beta > 0."""

    sync_steps: Natural = 0
    """Steps between its moves towards the policy; 0 leaves it where the stage started."""
    sync_share: Share = 0.6
    """How far it moves: reference = share * policy + (1 - share) * reference. Source: TR-DPO,
    arXiv:2404.09656."""


class GRPOOptimConfig(OptimConfig):
    """AdamW and its schedule; reinforcement learning takes smaller steps."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate, at its highest."""


class GRPOConfig(Duration):
    """Group relative policy optimisation."""

    prompts_per_step: PositiveInt = 8
    """Groups a step, over all ranks."""
    num_completions: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt: M."""
    num_iterations: PositiveInt = 1
    """Updates from one batch of completions."""
    max_resamples: Natural = 0
    """Dynamic sampling: groups with equal rewards are replaced by other prompts', drawn up to this many times
    a step; 0 keeps them. Source: DAPO, arXiv:2503.14476."""
    mask_truncated: bool = False
    """Overlong filtering: a completion that was cut off does not reach the gradient."""
    reference: ReferenceConfig = ReferenceConfig()
    loss: LossConfig = LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    optim: GRPOOptimConfig = GRPOOptimConfig()


class RolloutConfig(Section):
    """Sampling of completions for GRPO."""

    engine: Literal["native", "vllm"] = "native"
    """What samples: this package, or vLLM, inside each rank or as a server."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits, in sampling and in the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: Natural = 0
    """Sample from this many of the likeliest tokens; 0 from all."""
    max_new_tokens: PositiveInt = 256
    """A completion that reaches this length is cut off."""
    max_tokens: PositiveInt = 65536
    """Tokens cached at a time; more prompts wait for room, with the same result."""
    cuda_graphs: bool = False
    """native, on a GPU: a token's step is captured once and replayed. Has not run on a GPU yet."""
    max_staleness: Natural = 0
    """Updates that may lie between the weights that sample and those that learn from it. 0: a step samples,
    then learns. 1: the next step's completions are sampled while this one learns. More evens out steps of
    unequal length."""
    importance_sampling: Literal["none", "truncate", "mask"] = "none"
    """What corrects for a sampler that is not quite the policy: each token counts by the ratio of the
    trainer's probability to the sampler's, at most `importance_cap`; `mask` leaves out tokens whose ratio is
    beyond 1 / cap to cap. Costs a forward pass."""
    importance_cap: Annotated[float, Field(gt=1)] = 2.0
    """See `importance_sampling`."""
    max_mismatch: Annotated[float, Field(gt=1)] | None = None
    """The run stops where sampling/token_mult_prob_error, the mean over tokens of exp(|difference of the
    sampler's and the trainer's log-probability|), is above this. What top_p and top_k cut off counts as a
    difference, and so does dropout."""
    tensor_parallel_size: PositiveInt = 1
    """vllm: ranks that share a copy of the weights; of a server, the GPUs that --serve gives it."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.35
    """vllm in ranks: share of the GPU for its weights and cache; given back while the policy learns, where
    `max_staleness` is 0. On a CPU its cache holds `max_tokens`."""
    max_model_len: PositiveInt | None = None
    """vllm: the most tokens of a prompt and a completion. Without it, data.max_prompt_tokens and
    max_new_tokens together; without that, what the model's config says."""
    server_url: str | None = None
    """vllm as a server, started with `python -m geo_r1.train RECIPE --serve`: where it answers."""
    timeout: Annotated[float, Field(gt=0)] = 900.0
    """Server: seconds for one prompt's completions."""
    patience: Annotated[float, Field(gt=0)] = 300.0
    """Server: seconds to wait for one that does not answer, before the run stops at a checkpoint."""

    @model_validator(mode="after")
    def _read_by_its_engine(self) -> RolloutConfig:
        in_ranks = self.engine == "vllm" and self.server_url is None
        readers = {
            "server_url": (self.engine == "vllm", "engine = vllm"),
            "max_model_len": (self.engine == "vllm", "engine = vllm"),
            "tensor_parallel_size": (self.engine == "vllm", "engine = vllm"),
            "gpu_memory": (in_ranks, "engine = vllm inside the ranks"),
            "timeout": (self.server_url is not None, "a server: set server_url"),
            "patience": (self.server_url is not None, "a server: set server_url"),
            "importance_cap": (self.importance_sampling != "none", "importance_sampling = truncate or mask"),
            "cuda_graphs": (
                self.engine == "native" and not self.max_staleness,
                "engine = native with max_staleness = 0: nothing may run beside a capture",
            ),
        }
        for key, (read, by) in readers.items():
            if not read and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for {by}")
        if in_ranks and self.tensor_parallel_size > 1 and self.max_staleness:
            raise ValueError(
                "tensor_parallel_size > 1 would talk between ranks while the trainer does: sample ahead "
                "(max_staleness) by a server, or with one copy a rank"
            )
        return self

    @field_validator("server_url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                parts = urlsplit(url)
                whole = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
                known = parts.port is None or parts.port > 0
            except ValueError:  # a port that is no number
                whole = known = False
            if not (whole and known):
                raise ValueError(f"a server's address is like http://host:8000, not {url}")
        return url


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
    """`world`, or a JSONL or parquet file."""
    num_samples: Natural = 500
    """The first so many; 0 takes all of a file."""
    max_new_tokens: PositiveInt = 256
    """A completion that reaches this length is cut off."""
    max_tokens: PositiveInt = 65536
    """Cached tokens at a time."""
    gallery: Natural = 12
    """Samples that the report shows."""
    every: Natural = 0
    """Steps between evaluations of a model in training; 0 evaluates finished stages only."""
    every_num_samples: Natural = 0
    """Samples of these evaluations; 0 takes num_samples."""
    keep_best: bool = False
    """A stage leaves the model that these evaluations found most accurate, not its last one."""

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
    """Write TensorBoard's files into the run's folder."""
    rollouts_every: Natural = 50
    """GRPO's first step, and every step whose number this divides, leaves what was sampled, with pictures and
    rewards, in rollouts/ and in the report; 0: none does."""
    rollouts_prompts: PositiveInt = 4
    """Of so many prompts of such a step."""
    wandb: bool = False
    """Send figures to Weights & Biases."""
    project: str = "geo_r1"
    """W&B project."""


class Recipe(BaseSettings):
    """Everything that decides a run."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, cli_avoid_json=True
    )

    run: RunConfig = RunConfig()
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
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

    @model_validator(mode="after")
    def _adapters_alone(self) -> Recipe:
        for stage in STAGES[:-1]:
            if self.lora.rank and getattr(self, stage).freeze:
                raise ValueError(
                    f"{stage}.freeze means nothing with lora.rank > 0, which trains adapters alone; choose "
                    "their layers by lora.targets and lora.vision"
                )
        return self

    @model_validator(mode="after")
    def _reference_can_move(self) -> Recipe:
        if self.grpo.reference.sync_steps and (self.lora.rank or not self.grpo.loss.beta):
            why = "the policy without its adapters" if self.lora.rank else "not held while grpo.loss.beta = 0"
            raise ValueError(f"grpo.reference.sync_steps: the reference cannot move, it is {why}")
        return self
