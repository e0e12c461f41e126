"""How an endpoint is asked, and the options of a command that say so."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class EndpointConfig:
    """How an endpoint is asked. The key itself is not here: it stays in the environment.

    Attributes:
        url: where the API begins, such as http://localhost:8000/v1; /v1 is added where there is no path.
        model: as the endpoint names it.
        key_variable: the environment variable with the key; unset for local servers, which need none.
        concurrency: requests in flight.
        timeout: seconds for one try, from the request to the last byte.
        retries: further tries of a request.
        temperature, max_tokens: of the reply; None leaves them to the endpoint.
        seed: of the random share of the waits between tries.

    Raises:
        ValueError: a value is out of range; names the option.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    temperature: float | None = None
    max_tokens: int | None = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound or parts.username or parts.password or parts.query or parts.fragment:
            # not shown: a key may stand in it
            raise ValueError(
                f"--url must be http(s)://host[:port]/path; a key belongs in {self.key_variable}"
            )
        if not self.model:
            raise ValueError("--model must name the endpoint's model")
        if self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, got {self.concurrency}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"--timeout must be above 0 seconds, got {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"--retries must be at least 0, got {self.retries}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature must be from 0 to 2, got {self.temperature}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"--max-tokens must be at least 1, got {self.max_tokens}")

    @property
    def base_url(self) -> str:
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"

    @classmethod
    def of(cls, options: argparse.Namespace, prefix: str = "", **given: Any) -> EndpointConfig:
        """The endpoint that options of `add_endpoint_arguments` name.

        Args:
            prefix: as given there.
            given: fields that do not come from the options.

        Raises:
            ValueError: the address or the model is missing, or a value is out of range.
        """
        flag = f"--{prefix}-" if prefix else "--"
        start = f"{prefix}_" if prefix else ""
        found = {field.name: getattr(options, start + field.name, None) for field in fields(cls)} | given
        if not found["url"] or not found["model"]:
            raise ValueError(f"an endpoint needs {flag}url and {flag}model")
        return cls(**{name: value for name, value in found.items() if value is not None})

    def key(self) -> str:
        """The key, "none" where the variable is unset.

        Raises:
            ValueError: it cannot be sent.
        """
        key = os.environ.get(self.key_variable, "").strip() or "none"
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{self.key_variable} holds characters that cannot be part of a key")
        return key


def add_endpoint_arguments(
    parser: argparse._ActionsContainer, prefix: str = "", sampling: bool = True
) -> None:
    """Add the options that `EndpointConfig.of` reads.

    Args:
        prefix: "judge" makes them --judge-url and so on.
        sampling: False leaves out --model, --temperature and --max-tokens, for who has options of that name.
    """
    flag, default = f"--{prefix}-" if prefix else "--", EndpointConfig("http://localhost", "any")
    parser.add_argument(f"{flag}url", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    parser.add_argument(
        f"{flag}key-variable",
        default=default.key_variable,
        metavar="NAME",
        help="environment variable with the key, which goes to the url; unset for none (%(default)s)",
    )
    numbers: list[tuple[str, type, Any, str]] = [
        ("concurrency", int, default.concurrency, "requests at once"),
        ("timeout", float, default.timeout, "seconds for one try"),
        ("retries", int, default.retries, "further tries of a request"),
    ]
    if sampling:
        parser.add_argument(f"{flag}model", help="the model's name at the endpoint")
        numbers.append(("max-tokens", int, default.max_tokens, "tokens of a reply"))
        numbers.append(("temperature", float, None, "of the reply"))
    for name, kind, value, what in numbers:
        told = "the endpoint's own" if value is None else "%(default)s"
        parser.add_argument(f"{flag}{name}", type=kind, default=value, help=f"{what} ({told})")
