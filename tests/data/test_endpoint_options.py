"""The options of a command that asks an endpoint."""

import argparse

import pytest
from data_cases import ends_with

from geo_r1.data.teaching.endpoint import EndpointConfig, add_endpoint_arguments


def parsed(*arguments, **options):
    parser = argparse.ArgumentParser()
    add_endpoint_arguments(parser, **options)
    return parser.parse_args(arguments)


def test_options_become_a_config():
    options = parsed("--url", "http://h:1", "--model", "m", "--retries", "0", "--temperature", "0")
    assert EndpointConfig.of(options) == EndpointConfig("http://h:1", "m", retries=0, temperature=0.0)
    assert EndpointConfig.of(options, max_tokens=5).max_tokens == 5
    options = parsed("--judge-url", "http://h", "--judge-model", "j", prefix="judge")
    assert EndpointConfig.of(options, "judge") == EndpointConfig("http://h", "j")
    options = parsed("--url", "http://h", sampling=False)
    assert EndpointConfig.of(options, model="m", max_tokens=3) == EndpointConfig(
        "http://h", "m", max_tokens=3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": 0}, "--concurrency must be at least 1, got 0"),
        ({"timeout": float("nan")}, "--timeout must be above 0 seconds, got nan"),
        ({"retries": -1}, "--retries must be at least 0, got -1"),
        ({"temperature": 3.0}, "--temperature must be from 0 to 2, got 3.0"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1, got 0"),
        ({"model": ""}, "--model must name the endpoint's model"),
    ],
)
def test_options_out_of_range(changes, message):
    ends_with(message, lambda: EndpointConfig(**{"url": "http://h", "model": "m", **changes}))


def test_an_endpoint_without_address_or_model():
    ends_with("an endpoint needs --url and --model", lambda: EndpointConfig.of(parsed("--url", "http://h")))
    ends_with(
        "an endpoint needs --judge-url and --judge-model",
        lambda: EndpointConfig.of(parsed(prefix="judge"), "judge"),
    )


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("https://h/api/v3/", "https://h/api/v3"),
        ("https://h/v1/chat/completions", "https://h/v1"),
    ],
)
def test_where_the_api_begins(url, base):
    assert EndpointConfig(url, "m").base_url == base
