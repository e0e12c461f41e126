"""Settings of an endpoint, and command-line options for them."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from geo_r1.errors import UserError


@dataclass(frozen=True)
class EndpointConfig:
    """Settings of an endpoint. The key itself stays in the environment.

    Attributes:
        url: base address of the API, such as http://localhost:8000/v1; /v1 is added if it has no path.
        model: the model's name at the endpoint.
        key_variable: the environment variable with the key; leave it unset for servers without keys.
        concurrency: number of requests in flight.
        timeout: seconds for one try, from the request to the last byte.
        retries: how often a request is tried again.
        temperature, max_tokens: for the reply; None leaves them to the endpoint.

    Raises:
        UserError: a value is out of range; names the option.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    temperature: float | None = None
    max_tokens: int | None = 2048

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound or parts.username or parts.password or parts.query or parts.fragment:
            # not shown, since it may contain a key
            raise UserError(f"--url must be http(s)://host[:port]/path; a key belongs in {self.key_variable}")
        if not self.model:
            raise UserError("--model must name the endpoint's model")
        for flag, value, sound, limits in (
            ("concurrency", self.concurrency, self.concurrency >= 1, "at least 1"),
            ("timeout", self.timeout, 0 < self.timeout < math.inf, "above 0 seconds"),
            ("retries", self.retries, self.retries >= 0, "at least 0"),
            ("temperature", self.temperature, 0 <= (self.temperature or 0) <= 2, "from 0 to 2"),
            ("max-tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
        ):
            if not sound:
                raise UserError(f"--{flag} must be {limits}, got {value}")

    @property
    def base_url(self) -> str:
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"

    @classmethod
    def of(cls, options: argparse.Namespace, prefix: str = "", **given: Any) -> EndpointConfig:
        """The endpoint that the options of `add_endpoint_arguments` describe.

        Args:
            prefix: as in `add_endpoint_arguments`.
            given: fields that override the options.

        Raises:
            UserError: the address or the model is missing, or a value is out of range.
        """
        flag = f"--{prefix}-" if prefix else "--"
        start = f"{prefix}_" if prefix else ""
        found = {field.name: getattr(options, start + field.name, None) for field in fields(cls)} | given
        if not found["url"] or not found["model"]:
            raise UserError(f"an endpoint needs {flag}url and {flag}model")
        return cls(**{name: value for name, value in found.items() if value is not None})

    def key(self) -> str:
        """The key, or "none" if the variable is unset.

        Raises:
            UserError: the key cannot be sent.
        """
        key = os.environ.get(self.key_variable, "").strip() or "none"
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{self.key_variable} holds characters that cannot be part of a key")
        return key


def add_endpoint_arguments(
    parser: argparse._ActionsContainer, prefix: str = "", sampling: bool = True
) -> None:
    """Add the options that `EndpointConfig.of` reads.

    Args:
        prefix: "judge" gives --judge-url and so on.
        sampling: False leaves out --model, --temperature and --max-tokens, for commands with their own.
    """
    flag, default = f"--{prefix}-" if prefix else "--", EndpointConfig("http://localhost", "any")
    parser.add_argument(f"{flag}url", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    parser.add_argument(
        f"{flag}key-variable",
        default=default.key_variable,
        metavar="NAME",
        help="environment variable with the key for the url; leave it unset for no key (%(default)s)",
    )
    numbers: list[tuple[str, type, Any, str]] = [
        ("concurrency", int, default.concurrency, "requests at once"),
        ("timeout", float, default.timeout, "seconds for one try"),
        ("retries", int, default.retries, "how often a request is tried again"),
    ]
    if sampling:
        parser.add_argument(f"{flag}model", help="the model's name at the endpoint")
        numbers.append(("max-tokens", int, default.max_tokens, "limit on the tokens of a reply"))
        numbers.append(("temperature", float, None, "of the reply"))
    for name, kind, value, what in numbers:
        told = "the endpoint's own" if value is None else "%(default)s"
        parser.add_argument(f"{flag}{name}", type=kind, default=value, help=f"{what} ({told})")
