"""What a vLLM server answers, checked field by field before anything is made of it."""

from __future__ import annotations

from pydantic import BaseModel


class Span(BaseModel):
    version: str


class TokenLogprob(BaseModel):
    logprob: float


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class Choice(BaseModel):
    """One completion; its tokens, their log-probabilities, and the weights that sampled them."""

    index: int
    token_ids: list[int]
    logprobs: Logprobs
    finish_reason: str | None
    weight_versions: list[Span]


class Generated(BaseModel):
    """Of /inference/v1/generate."""

    choices: list[Choice]
    prompt_token_ids: list[int]


class WeightInfo(BaseModel):
    """Of /weight_info."""

    weight_version: str | None


class Received(BaseModel):
    """What one worker made of the weights; see `WeightReceiver.receive_weights`."""

    refused: str | None
    lost: str | None


class Described(BaseModel):
    """What one worker says of itself; see `WeightReceiver.describe_receiver`."""

    logprobs_mode: str
    data_parallel_size: int
    max_model_len: int


class AllReceived(BaseModel):
    """Of /collective_rpc: one result of each worker."""

    results: list[Received]


class AllDescribed(BaseModel):
    """Of /collective_rpc: one result of each worker."""

    results: list[Described]
