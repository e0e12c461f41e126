"""Sections of a recipe about learning: stages, optimiser, loss, sampling; and the whole recipe."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from geo_r1.train.recipe.run_sections import (
    STAGES,
    DataConfig,
    EvalConfig,
    Free,
    LogConfig,
    LoraConfig,
    ModelConfig,
    Natural,
    NotNegative,
    ParallelConfig,
    Positive,
    PositiveInt,
    RewardConfig,
    RunConfig,
    Section,
    Share,
    WorldConfig,
)

Part = Literal["vision", "projector", "text"]


class OptimConfig(Section):
    """AdamW and its schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"] = "adamw"
    """torch's own, or one of torchao's: state in 8 bits, or weights and state in bfloat16 with stochastic
    rounding."""
    lr: Positive = 1e-5
    """Peak learning rate."""
    vision_lr: Positive | None = None
    """Peak learning rate of the vision tower and its projector, on the same schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After warm-up: stay, or fall towards `min_lr_ratio` of lr, reached by the step after the last."""
    warmup_ratio: Share = 0.0
    """Share of the steps over which the rate rises from zero."""
    min_lr_ratio: Share = 0.0
    """Where `schedule` ends, as a share of lr."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of Adam's averages of the gradient and of its square."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay: a step takes lr times this share off every weight."""
    max_grad_norm: Positive = 1.0
    """A longer gradient is scaled down to this norm."""
    max_tokens: Free[PositiveInt] = 16384
    """Tokens per packed micro-batch. Several micro-batches are accumulated, with the same gradient."""


class Duration(Section):
    """Data and length of a stage: set steps or epochs, not both. The world has no epochs."""

    data: str = "world"
    """`world`, or a JSONL or parquet file."""
    steps: PositiveInt | None = None
    """Steps of the stage. A recipe with this section sets either steps or epochs."""
    epochs: Positive | None = None
    """Passes over the data, rounded to whole steps."""
    freeze: tuple[Part, ...] = ()
    """Parts that are not trained: the vision tower, its projector, the text model with its head."""
    save_every: Free[PositiveInt] = 500
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _one_duration(self) -> Duration:
        if (self.steps is None) == (self.epochs is None):
            found = "both" if self.steps else "neither"
            raise ValueError(f"set exactly one of steps and epochs; {found} is set")
        if self.data == "world" and self.steps is None:
            raise ValueError("the world never ends: set steps, not epochs")
        return self


class SFTConfig(Duration):
    """Supervised fine-tuning on responses."""

    batch_size: PositiveInt = 32
    """Samples per step, over all ranks."""
    optim: OptimConfig = OptimConfig()


class LossConfig(Section):
    """GRPO's token loss; the names are TRL's."""

    type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo"] = "dapo"
    """How tokens are averaged."""
    policy: Literal["clip", "cispo", "sapo", "vespo", "geo_mean"] = "clip"
    """The policy term: clipped PPO, CISPO (arXiv:2506.13585), SAPO (arXiv:2511.20347), VESPO
    (arXiv:2602.10693) or the geometric mean of clipped ratios, GMPO (arXiv:2507.20673)."""
    epsilon: NotNegative = 0.2
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: NotNegative | None = None
    """The ratio is clipped above 1 + epsilon_high; by default, above 1 + epsilon."""
    delta: Positive | None = None
    """Upper bound on the ratio that also holds for negative advantages."""
    cispo_low: NotNegative | None = None
    """CISPO's lower bound of the ratio, as verl has it; TRL has none."""
    sapo_temperature_pos: Positive = 1.0
    """SAPO's temperature for positive advantages."""
    sapo_temperature_neg: Positive = 1.05
    """SAPO's temperature for negative advantages."""
    vespo_k_pos: NotNegative = 2.0
    """VESPO's power of the completion's ratio, for advantages of at least 0."""
    vespo_lambda_pos: Positive = 3.0
    """VESPO's decay with the completion's ratio, for advantages of at least 0."""
    vespo_k_neg: NotNegative = 3.0
    """VESPO's power for negative advantages."""
    vespo_lambda_neg: Positive = 2.0
    """VESPO's decay for negative advantages."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Use the ratio of each token, or of the whole completion (GSPO); with sequence_token a token's gradient
    is still its own."""
    off_policy_mask_threshold: Positive | None = None
    """Leave out completions with a negative advantage that have become less likely by more than this many
    nats a token. Source: DeepSeek-V3.2, arXiv:2512.02556."""
    beta: NotNegative = 0.0
    """Weight of the KL to the reference model."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "low_var_kl"] = "k3"
    """How the KL is estimated from the sampled tokens. k1+ and k3+ have the gradient of k2; low_var_kl is k3,
    at most 10."""
    use_bias_correction_kl: bool = False
    """Multiply the KL by the ratio, so that its gradient is unbiased. Source: DeepSeek-V3.2,
    arXiv:2512.02556."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


class AdvantageConfig(Section):
    """How a completion is scored against its group."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the others in it."""
    scale: Literal["group", "batch", "none"] = "group"
    """What the difference is divided by: the group's standard deviation, the step's, or nothing."""
    eps: Positive = 1e-4
    """Added to that deviation."""


class ReferenceConfig(Section):
    """The model that the KL is measured against. It exists only if loss.beta > 0."""

    sync_steps: Natural = 0
    """Steps between its moves towards the policy; 0 leaves it where the stage started."""
    sync_share: Share = 0.6
    """How far it moves: reference = share * policy + (1 - share) * reference. Source: TR-DPO,
    arXiv:2404.09656."""


class GRPOOptimConfig(OptimConfig):
    """AdamW and its schedule, with the smaller steps of reinforcement learning."""

    lr: Positive = 1e-6
    """Peak learning rate."""


class GRPOConfig(Duration):
    """Group relative policy optimisation."""

    prompts_per_step: PositiveInt = 8
    """Groups per step, over all ranks."""
    num_completions: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt: M."""
    num_iterations: PositiveInt = 1
    """Updates from one batch of completions."""
    max_resamples: Natural = 0
    """Dynamic sampling: groups with equal rewards are replaced by groups of other prompts, up to this many
    times a step; 0 keeps them. Source: DAPO, arXiv:2503.14476."""
    mask_truncated: bool = False
    """Overlong filtering: leave completions that were cut off out of the gradient."""
    reference: ReferenceConfig = ReferenceConfig()
    loss: LossConfig = LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    optim: GRPOOptimConfig = GRPOOptimConfig()


class RolloutConfig(Section):
    """Sampling of completions for GRPO."""

    engine: Literal["native", "vllm"] = "native"
    """The rollout engine: this package's own, or vLLM, inside each rank or as a server."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: Natural = 0
    """Sample from this many of the likeliest tokens; 0 samples from all."""
    max_new_tokens: PositiveInt = 256
    """A completion that reaches this length is cut off."""
    max_tokens: Free[PositiveInt] = 65536
    """Tokens cached at a time. Prompts that do not fit wait; the result is the same."""
    cuda_graphs: Free[bool] = False
    """native, on a GPU: capture the step of a token once and replay it. Not yet run on a GPU."""
    max_staleness: Natural = 0
    """Updates that may lie between the weights that sample and those that learn. With 0, a step samples, then
    learns. With 1, the next step's completions are sampled while this one learns. More evens out steps of
    unequal length."""
    importance_sampling: Literal["none", "truncate", "mask"] = "none"
    """Correction for a sampler that differs from the policy: each token is weighted by the trainer's
    probability over the sampler's, at most `importance_cap`; `mask` leaves out tokens whose ratio is outside
    1 / cap to cap. Costs a forward pass."""
    importance_cap: Annotated[float, Field(gt=1)] = 2.0
    """Bound on the ratios of `importance_sampling`."""
    max_mismatch: Free[Annotated[float, Field(gt=1)] | None] = None
    """Stop the run if sampling/token_mult_prob_error exceeds this: the mean over tokens of exp(|difference of
    the sampler's and the trainer's log-probability|). Tokens that top_p and top_k cut off count too, and
    so does dropout."""
    tensor_parallel_size: Free[PositiveInt] = 1
    """vllm: ranks that share a copy of the weights; with a server, the GPUs that --serve uses."""
    gpu_memory: Free[Annotated[float, Field(gt=0, lt=1)]] = 0.35
    """vllm in ranks: share of the GPU for its weights and cache. With `max_staleness` = 0 it is freed while
    the policy learns. On a CPU the cache holds `max_tokens`."""
    max_model_len: Free[PositiveInt | None] = None
    """vllm: the most tokens of a prompt with its completion. By default data.max_prompt_tokens plus
    max_new_tokens; if that is not set either, the limit in the model's config."""
    server_url: Free[str | None] = None
    """vllm: address of a server that was started with `python -m geo_r1.train RECIPE --serve`."""
    timeout: Free[Positive] = 900.0
    """Server: seconds to wait for the completions of one prompt."""
    patience: Free[Positive] = 300.0
    """Server: seconds to wait for a server that does not answer before the run stops at a checkpoint."""

    @model_validator(mode="after")
    def _read_by_its_engine(self) -> RolloutConfig:
        vllm, served, ahead = self.engine == "vllm", self.server_url is not None, self.max_staleness > 0
        of_vllm, of_server = (vllm, "engine = vllm"), (served, "a server: set server_url")
        alone = "engine = native with max_staleness = 0: nothing may run beside a capture"
        readers = {
            "server_url": of_vllm,
            "max_model_len": of_vllm,
            "tensor_parallel_size": of_vllm,
            "gpu_memory": (vllm and not served, "engine = vllm inside the ranks"),
            "timeout": of_server,
            "patience": of_server,
            "importance_cap": (self.importance_sampling != "none", "importance_sampling = truncate or mask"),
            "cuda_graphs": (not vllm and not ahead, alone),
        }
        self.check_readers(readers)
        if vllm and not served and ahead and self.tensor_parallel_size > 1:
            raise ValueError(
                "tensor_parallel_size > 1 would talk between ranks while the trainer does: sample ahead "
                "(max_staleness) with a server, or with one copy per rank"
            )
        return self

    @field_validator("server_url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
            valid = whole and parts.port != 0
        except ValueError:  # a port that is not a number
            valid = False
        if "@" in url:  # the recipe is copied into the run's folder, its report and its exports
            raise ValueError("an address must hold no password; the key of a server is VLLM_API_KEY")
        if not valid:
            raise ValueError(f"a server's address is like http://host:8000, not {url}")
        return url


class Recipe(BaseSettings):
    """All settings of a run."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, cli_avoid_json=True
    )

    run: RunConfig = RunConfig()
    parallel: Free[ParallelConfig] = ParallelConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    pretrain: SFTConfig = SFTConfig(steps=100)
    sft: SFTConfig = SFTConfig(steps=100)
    grpo: GRPOConfig = GRPOConfig(steps=100)
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    eval: Free[EvalConfig] = EvalConfig()
    log: Free[LogConfig] = LogConfig()

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, *_, **__):
        """Take only what `load_recipe` passes: no environment variables, no files found by chance."""
        return (init_settings,)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        order = [STAGES.index(stage) for stage in self.run.stages]
        if not order or order != sorted(set(order)):
            found = ", ".join(self.run.stages) or "none"
            raise ValueError(
                f"run.stages must be some of {', '.join(STAGES)}, in this order, each once; got {found}"
            )
        for stage in STAGES[:-1]:
            if self.lora.rank and getattr(self, stage).freeze:
                raise ValueError(
                    f"{stage}.freeze means nothing with lora.rank > 0, which trains adapters alone; choose "
                    "their layers by lora.targets and lora.vision"
                )
        if self.grpo.reference.sync_steps and (self.lora.rank or not self.grpo.loss.beta):
            why = "the policy without its adapters" if self.lora.rank else "not held while grpo.loss.beta = 0"
            raise ValueError(f"grpo.reference.sync_steps: the reference cannot move, it is {why}")
        return self
