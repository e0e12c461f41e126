"""The fused ops in a plain PyTorch loop: fine-tuning, then GRPO, of a tiny text model. Seconds on a CPU.

    python examples/fused_loss.py

The logits of all tokens, [R, V], are never held: both losses take hidden states and the language head.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from geo_r1.kernels import (
    GRPOLossConfig,
    group_advantage,
    linear_cross_entropy,
    linear_grpo_loss,
    token_weights,
)

VOCAB, PROMPT, COMPLETION = 64, 4, 6  # tokens
GROUPS, M = 4, 8  # prompts a step, and completions of each
WANTED = 7  # the reward: the share of a completion that is this token


def hidden_and_targets(model, tokens):
    """The hidden states [R, C] that predict the completions' tokens, and these tokens [R]."""
    hidden = model.model(tokens).last_hidden_state[:, PROMPT - 1 : -1]
    return hidden.flatten(0, 1), tokens[:, PROMPT:].flatten()


@torch.no_grad()
def sample(model, tokens):
    for _ in range(COMPLETION):
        logits = model(tokens).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def main():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=1, **sizes))
    head = model.lm_head.weight
    weights = token_weights(torch.full((GROUPS * M,), COMPLETION), "dapo")  # every token counts the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    examples = torch.randint(VOCAB, (GROUPS * M, PROMPT + COMPLETION))  # to be learned by heart
    for step in range(20):
        hidden, target = hidden_and_targets(model, examples)
        loss = linear_cross_entropy(hidden, head, target, weights)
        update(optimizer, loss)
        if step % 19 == 0:
            print(f"fine-tuning step {step}: loss {loss.item():.3f}")

    cu_group = torch.arange(GROUPS + 1, dtype=torch.int32) * M  # where each group of completions starts
    config = GRPOLossConfig(epsilon=0.2)
    for step in range(60):
        prompts = torch.randint(VOCAB, (GROUPS, PROMPT)).repeat_interleave(M, 0)
        tokens = sample(model, prompts)
        reward = (tokens[:, PROMPT:] == WANTED).float().mean(1)
        advantage = group_advantage(reward, cu_group).repeat_interleave(COMPLETION)
        hidden, target = hidden_and_targets(model, tokens)
        update(optimizer, linear_grpo_loss(hidden, head, target, advantage, weights, config=config).loss)
        if step % 59 == 0:
            print(f"GRPO step {step}: mean reward {reward.mean():.3f}")


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
