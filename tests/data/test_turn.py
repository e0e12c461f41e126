"""The assistant's turn: what a template opens, a response after it, and a completion's text."""

import pytest
from tokenizers import AddedToken
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.answers import well_formed
from geo_r1.data import PromptEncoder, Sample
from geo_r1.data.turn import completion_text
from geo_r1.eval.native import complete
from geo_r1.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer
from geo_r1.rollout import Completion

TEXTS = ["user\n", "assistant\n", "<think>a</think>\n<answer>B</answer>"]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RESPONSE = "<think>water</think>\n<answer>B</answer>"


def encoder(opening="", special=()):
    """An encoder whose template opens the answer with this text."""
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif")
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in special], special_tokens=True)
    image = SPECIAL_TOKENS.index("<|image_pad|>")
    processor = Qwen2VLImageProcessorPil(patch_size=14, size={"shortest_edge": 784, "longest_edge": 7840})
    return PromptEncoder(tokenizer, processor, image)


def sample(text="Say <think>, then <answer>."):
    return Sample("row", ({"role": "user", "content": [{"type": "text", "text": text}]},))


OPENINGS = {
    "": "",
    "<think>": "<think>",
    "<think>\n": "<think>\n",
    "\n<think>\nFirst, ": "<think>\nFirst, ",
    "<think>\n\n</think>\n\n": "",  # thinking is off: the answer may think for itself
    "<think>\n\n</think>\n\n<answer>": "<think>\n\n</think>\n\n<answer>",
    "Sure: <reasoning>": "<reasoning>",
    "a < b": "",
}


@pytest.mark.parametrize(("written", "opening"), OPENINGS.items())
def test_what_the_template_opens_belongs_to_the_text(written, opening):
    own = encoder(written)
    prompt = own.encode(sample())
    assert prompt.opening == opening
    assert own.tokenizer.decode(prompt.token_ids).endswith(f"assistant\n{written}")
    token_ids = own.tokenizer.encode("so</think>")
    assert completion_text(own.tokenizer, prompt.opening, token_ids) == f"{opening}so</think>"


@pytest.mark.parametrize(
    ("opening", "response", "learned"),
    [
        ("", RESPONSE, RESPONSE),
        ("", " x", " x"),
        ("<think>", RESPONSE, "water</think>\n<answer>B</answer>"),
        ("<think>\n", RESPONSE, "water</think>\n<answer>B</answer>"),
        ("<think>\n", f"\n{RESPONSE}", "water</think>\n<answer>B</answer>"),
        ("<think>\n", "<think>\n\nwater</think>B", "\nwater</think>B"),
        ("<think>\n", "<think> water</think>B", "water</think>B"),
        ("<think>\n", "water</think>B", "water</think>B"),  # as this template's own data is written
        ("<think>\n", "<answer>B</answer>", "\n</think>\n\n<answer>B</answer>"),
        ("<think>\n\n</think>\n\n", RESPONSE, RESPONSE),
        ("<think>\nFirst, ", RESPONSE, "water</think>\n<answer>B</answer>"),
        ("<think>\n\n</think>\n\n<answer>", RESPONSE, "B</answer>"),
        ("<answer>", "<answer>B</answer>", "B</answer>"),
        ("<think>\n", "Well. <think>x</think>B", "Well. <think>x</think>B"),
    ],
)
def test_a_response_goes_on_after_the_opening(opening, response, learned):
    own = encoder(opening)
    prompt = own.encode(sample())
    token_ids = own.encode_response(response, prompt.opening)
    assert own.tokenizer.decode(token_ids) == f"{learned}<|im_end|>"
    text = completion_text(own.tokenizer, prompt.opening, token_ids)
    assert text == prompt.opening + learned
    if response == RESPONSE:
        assert well_formed(text)


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "<|im_end|>",
        "<|im_end|>\n",
        "<|endoftext|>",
        "<|im_end|><|endoftext|>",
        " <|im_end|> \n<|im_end|>",
    ],
)
def test_one_end_token_is_learned(ending):
    own = encoder()
    token_ids = own.encode_response(f"{RESPONSE}{ending}")
    kept = " " if ending.startswith(" ") else ""
    assert own.tokenizer.decode(token_ids) == f"{RESPONSE}{kept}<|im_end|>"
    assert own.encode_response("<|im_end|>") == [own.tokenizer.eos_token_id]
    assert own.tokenizer.decode(own.encode_response("a <|im_end|> b")) == "a <|im_end|> b<|im_end|>"


def test_tags_that_are_special_tokens_stay_in_the_text():
    special = (*TAGS, "<point>", "<|box|>", "[X]", "<stop>")
    own = encoder(special=special)
    own.tokenizer.pad_token = "<stop>"
    text = f"{RESPONSE}<point>1<|box|>2[X]3<stop>"
    token_ids = own.encode_response(text)
    assert own.tokenizer.decode(token_ids, skip_special_tokens=True) == "water\nB123"
    assert completion_text(own.tokenizer, "", token_ids) == f"{RESPONSE}<point>123"


def test_without_such_tags_the_text_is_what_the_tokenizer_makes_of_it():
    own = encoder()
    token_ids = [*range(len(own.tokenizer))]
    plain = own.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert completion_text(own.tokenizer, "", token_ids) == plain
    assert completion_text(own.tokenizer, "", []) == ""


def test_the_native_sampler_reads_texts_with_what_was_opened():
    own = encoder("<think>\n", TAGS)
    prompt = own.encode(sample())
    completion = Completion(own.encode_response(RESPONSE, prompt.opening), [], True)
    [turn] = complete(lambda prompts: [[completion] for _ in prompts], own.tokenizer, [None, prompt])
    assert [text for _, text in turn] == ["", RESPONSE.replace("<think>", "<think>\n")]
