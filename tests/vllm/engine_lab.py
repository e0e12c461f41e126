"""A policy whose weights can be redrawn, its folder for vLLM, and the world's questions."""

from dataclasses import dataclass
from pathlib import Path

import torch

from geo_r1.data import PromptEncoder, World, exemplars
from geo_r1.kernels import linear_logprob
from geo_r1.models import EncodedPrompt, PackedVLM, pack
from geo_r1.models.tiny import build_tiny
from geo_r1.rollout import Completion
from geo_r1.rollout.vllm.requests import write_engine_folder

END = 2


@dataclass(frozen=True)
class Lab:
    """A policy in float32 with weights large enough that it has opinions, and prompts that keep images."""

    vlm: PackedVLM
    tokenizer: object
    image_processor: object
    folder: Path
    encoder: PromptEncoder
    prompts: list[EncodedPrompt]

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Other weights for the same model; the policy takes them over."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.vlm.model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(1.5 * noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_(0.1 * noise + float(not name.endswith("bias")))
        return dict(self.vlm.model.named_parameters())

    def logp(self, prompts: list[EncodedPrompt], groups: list[list[Completion]]) -> torch.Tensor:
        """The trainer's log-probabilities of what was said, vision tokens left out of the distribution."""
        batch = pack(prompts, [[completion.token_ids for completion in group] for group in groups])
        with torch.no_grad():
            hidden, head = self.vlm.loss_rows(batch), self.vlm.lm_head
            logp, _ = linear_logprob(hidden, head, batch.target_R)
            vision = (hidden @ head.T).softmax(1)[:, self.vlm.vision_token_ids].sum(1)
        return logp - torch.log1p(-vision)

    def assert_logp(self, prompts: list[EncodedPrompt], groups: list[list[Completion]], atol=1e-4) -> None:
        """What the engine told of each token is what the trainer computes."""
        told = torch.tensor([value for group in groups for c in group for value in c.logp])
        torch.testing.assert_close(told, self.logp(prompts, groups), rtol=0, atol=atol)


def make_lab(folder: Path) -> Lab:
    """A lab with 50 questions; the folder is written."""
    world = World()
    samples = [exemplars.question(world, "test", index) for index in range(50)]
    parts = [part for sample in samples for part in sample.messages[0]["content"]]
    texts = ["user\n", "assistant\n", *(part["text"] for part in parts if part["type"] == "text")]
    model, tokenizer, image_processor = build_tiny(texts)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == END
    write_engine_folder(folder, model.config, tokenizer, image_processor)
    encoder = PromptEncoder(tokenizer, image_processor, model.config.image_token_id, keep_images=True)
    prompts = [encoder.encode(sample) for sample in samples]
    return Lab(PackedVLM(model.eval()), tokenizer, image_processor, folder, encoder, prompts)
