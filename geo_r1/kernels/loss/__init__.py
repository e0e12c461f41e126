"""The GRPO family of losses, on logits and straight from hidden states."""
