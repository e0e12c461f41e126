"""What a mistyped key may mean: a key of another section, TRL's name for it, or a similar word."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

STAGE = "STAGE"  # of a key below: the stage that the user named, or else each that is fine-tuned
FINE_TUNED = ("sft", "grpo")
MOST = 4  # suggestions

# Names of TRL 1.16's and transformers' arguments whose keys here have other names.
# Those that have the same name need no line. docs/trl.md says how they differ.
TRL = {
    "adam_beta1": ("STAGE.optim.betas",),
    "adam_beta2": ("STAGE.optim.betas",),
    "bf16": ("model.dtype",),
    "dataloader_num_workers": ("data.num_workers",),
    "dataset_name": ("STAGE.data",),
    "ddp_timeout": ("run.hang_timeout",),
    "deepspeed": ("parallel.strategy",),
    "eval_steps": ("eval.every",),
    "eval_strategy": ("eval.every",),
    "fp16": ("model.dtype",),
    "fsdp": ("parallel.strategy",),
    "generation_batch_size": ("grpo.prompts_per_step",),
    "gradient_accumulation_steps": ("STAGE.optim.max_tokens",),
    "gradient_checkpointing": ("model.checkpointing",),
    "learning_rate": ("STAGE.optim.lr",),
    "load_best_model_at_end": ("eval.keep_best",),
    "log_completions": ("log.rollouts_every",),
    "logging_dir": ("run.dir",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "lora_r": ("lora.rank",),
    "lora_target_modules": ("lora.targets",),
    "loss_type": ("grpo.loss.type", "grpo.loss.policy"),
    "lr_scheduler_type": ("STAGE.optim.schedule",),
    "mask_truncated_completions": ("grpo.mask_truncated",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_prompt_length": ("data.max_prompt_tokens",),
    "max_steps": ("STAGE.steps",),
    "model_init_kwargs": ("model.path", "model.dtype"),
    "model_name_or_path": ("model.path",),
    "num_completions_to_print": ("log.rollouts_prompts",),
    "num_generations": ("grpo.num_completions",),
    "num_train_epochs": ("STAGE.epochs",),
    "output_dir": ("run.dir",),
    "peft_config": ("lora.rank",),
    "per_device_eval_batch_size": ("eval.max_tokens",),
    "per_device_train_batch_size": ("sft.batch_size", "grpo.prompts_per_step", "STAGE.optim.max_tokens"),
    "ref_model_mixup_alpha": ("grpo.reference.sync_share",),
    "ref_model_sync_steps": ("grpo.reference.sync_steps",),
    "report_to": ("log.tensorboard", "log.wandb"),
    "reward_funcs": ("rewards.functions",),
    "reward_weights": ("rewards.weights",),
    "run_name": ("run.dir",),
    "save_steps": ("STAGE.save_every",),
    "save_total_limit": ("run.keep_checkpoints",),
    "scale_rewards": ("grpo.advantage.scale",),
    "steps_per_generation": ("grpo.prompts_per_step",),
    "sync_ref_model": ("grpo.reference.sync_steps",),
    "torch_dtype": ("model.dtype",),
    "use_liger_kernel": ("model.liger",),
    "use_peft": ("lora.rank",),
    "use_vllm": ("rollout.engine",),
    "vllm_gpu_memory_utilization": ("rollout.gpu_memory",),
    "vllm_importance_sampling_cap": ("rollout.importance_cap",),
    "vllm_importance_sampling_clip_max": ("rollout.importance_cap",),
    "vllm_importance_sampling_correction": ("rollout.importance_sampling",),
    "vllm_importance_sampling_mode": ("rollout.importance_sampling",),
    "vllm_max_model_length": ("rollout.max_model_len",),
    "vllm_mode": ("rollout.server_url",),
    "vllm_server_base_url": ("rollout.server_url",),
    "vllm_server_host": ("rollout.server_url",),
    "vllm_server_port": ("rollout.server_url",),
    "vllm_server_timeout": ("rollout.patience",),
    "vllm_tensor_parallel_size": ("rollout.tensor_parallel_size",),
    "warmup_steps": ("STAGE.optim.warmup_ratio",),
}
# There is nothing to set here for these.
_NEEDLESS = """
    cache_implementation disable_dropout ds3_gather_for_generation log_multimodal log_unique_prompts
    logging_steps num_generations_eval pad_to_multiple_of remove_unused_columns resume_from_checkpoint
    shuffle_dataset transformers_continuous_batching_config use_transformers_continuous_batching
    use_transformers_paged vllm_enable_sleep_mode vllm_group_port
"""
# geo_r1 lacks these.
_LACKING = """
    cast_lm_head_to_fp32 chat_template_kwargs entropy_coef_delta entropy_coef_max entropy_coef_min
    entropy_target generation_kwargs log_completions_hub_repo max_tool_calling_iterations min_p
    multi_objective_aggregation push_to_hub repetition_penalty router_aux_loss_coef top_entropy_quantile
    trust_remote_code use_adaptive_entropy vllm_importance_sampling_clip_min vllm_model_impl
    vllm_structured_outputs_regex
"""
NEEDLESS, LACKING = frozenset(_NEEDLESS.split()), frozenset(_LACKING.split())


def hint(key: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown key: what may have been meant; empty if nothing is near.

    Args:
        key: as it was given, with or without a section.
        known: every key, with its section, and every section.
    """
    name = key.rsplit(".", 1)[-1].replace("-", "_")
    found = _nearest(key, [k for k in known if k.rsplit(".", 1)[-1] == name and k != name])
    if not found and name in TRL:
        return f"; TRL's {name} is {_either(_of_stage(key, TRL[name]))} here"
    if not found and name in NEEDLESS:
        return f"; TRL's {name} is needless: there is nothing to set here"
    if not found and name in LACKING:
        return f"; geo_r1 has nothing like TRL's {name}"
    if not found:
        names = {k.rsplit(".", 1)[-1] for k in known}
        close = difflib.get_close_matches(name, sorted(names), 1, 0.7)
        found = _nearest(key, [k for k in known if k.rsplit(".", 1)[-1] in close])
    if not found:
        found = difflib.get_close_matches(key, known, 1, 0.5)
    return f"; did you mean {_either(found)}?" if found else ""


def _nearest(key: str, candidates: list[str]) -> list[str]:
    """Of keys with the same name, the one whose section is near the given one, or all."""
    near = difflib.get_close_matches(key, candidates, 1, 0.8) if "." in key else []
    return near or candidates


def _of_stage(key: str, keys: Sequence[str]) -> list[str]:
    named = key.split(".", 1)[0]
    stages = [named] if named in ("pretrain", *FINE_TUNED) else FINE_TUNED
    whole = [k.replace(STAGE, stage) for k in keys for stage in (stages if STAGE in k else [""])]
    return [k for k in whole if k.startswith(f"{named}.")] or whole


def _either(keys: Sequence[str]) -> str:
    shown = [*keys[:MOST], "more"] if len(keys) > MOST else [*keys]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
