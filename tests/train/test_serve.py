"""`--serve`: what it becomes, where it listens, and what it refuses."""

import os
import shlex
import socket
import subprocess
import sys

import pytest
import small_runs as runs

import geo_r1.train.serve
from geo_r1.train.__main__ import main


@pytest.fixture
def vllm(monkeypatch):
    """A place where vLLM is; what this process would have become."""
    became = []

    def execve(*command):
        became.append(command)
        raise SystemExit

    monkeypatch.setattr(geo_r1.train.serve, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execve", execve)
    return became


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def served(vllm, tmp_path, flag, **changes):
    """Command line and environment of what it became."""
    with pytest.raises(SystemExit):
        main([*runs.arguments(tmp_path / "run", "grpo", **changes), flag])
    [(program, command, environment)] = vllm
    assert program == command[0] == sys.executable
    return command, environment


def refused(tmp_path, capfd, *flags, **changes):
    capfd.readouterr()
    assert main([*runs.arguments(tmp_path / "run", "grpo", **changes), *flags]) == 2
    out, err = capfd.readouterr()
    [line] = err.splitlines()
    assert out == "" and not (tmp_path / "run-server").exists()
    return line.removeprefix("geo_r1: ")


def test_a_server_is_vllms_own_with_the_recipes_model_but_no_weights(vllm, port, tmp_path, capfd):
    command, environment = served(vllm, tmp_path, f"--serve={port}", data__max_prompt_tokens=300)
    folder = tmp_path / "run-server"
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--max-model-len") + 1] == str(300 + 16)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.json", "tokenizer.json", "preprocessor_config.json"}
    assert not [*folder.glob("*.safetensors")]
    printed = shlex.split(capfd.readouterr().out)
    assert printed[0] == "VLLM_SERVER_DEV_MODE=1" and printed[-len(command) :] == command


@pytest.mark.parametrize(
    ("before", "host"), [("", "127.0.0.1"), ("0.0.0.0:", "0.0.0.0"), ("localhost:", "localhost")]
)
def test_it_listens_where_it_is_told_and_else_on_this_machine_alone(before, host, vllm, port, tmp_path):
    command, _ = served(vllm, tmp_path, f"--serve={before}{port}")
    assert command[command.index("--host") + 1] == host
    assert command[command.index("--port") + 1] == str(port)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("", "127.0.0.1", 8000), ("1", "127.0.0.1", 1), ("[::1]:65535", "::1", 65535), ("a.b:80", "a.b", 80)],
)
def test_an_address_is_a_port_with_or_without_a_host(address, host, port):
    assert geo_r1.train.serve._host_and_port(address) == (host, port)


@pytest.mark.parametrize("address", ["abc", "0", "65536", "-1", ":8000", "host:", "host:x", "[::1]"])
def test_what_is_no_address_is_refused(address, vllm, tmp_path, capfd):
    line = refused(tmp_path, capfd, f"--serve={address}")
    assert line.startswith("--serve takes a port of 1 to 65535") and line.endswith(f"not {address}")
    assert "--serve=8000 or --serve=10.0.0.1:8000" in line


def test_a_port_that_is_taken_is_refused(vllm, tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(tmp_path, capfd, f"--serve={port}")
    assert line.startswith(f"--serve cannot listen at 127.0.0.1, port {port}: Address already in use; ")


def test_what_vllm_cannot_do_is_refused(vllm, port, tmp_path, capfd):
    line = refused(tmp_path, capfd, f"--serve={port}", model__dtype="float64")
    assert line == "vLLM computes in float32 or bfloat16, not in model.dtype = float64"
    assert "temperature" in refused(tmp_path, capfd, f"--serve={port}", rollout__temperature=2.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--serve", "--dry-run"], "--dry-run and --serve do not go together: leave one out"),
        (["--serve", "9000"], "write --serve=9000, in one word"),
        (["--serve", "0.0.0.0:9000"], "write --serve=0.0.0.0:9000, in one word"),
        (["--serve="], "--serve= has no value: write one, or --serve alone"),
        (["--dry-run=x"], "--dry-run takes a number of ranks, such as --dry-run=8, not x"),
        (["--dry-run=0"], "--dry-run takes a number of ranks, such as --dry-run=8, not 0"),
        (["--sevre"], "unknown option --sevre; did you mean serve?"),
        (["--dryrun=8"], "unknown option --dryrun; did you mean dry-run?"),
    ],
)
def test_a_mistaken_flag_is_one_line(flags, message, vllm, tmp_path, capfd):
    assert refused(tmp_path, capfd, *flags) == message


def test_one_process_becomes_the_server(vllm, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "one process becomes the server, not 4 ranks" in refused(tmp_path, capfd, "--serve")


def test_a_server_is_not_started_where_vllm_is_not(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(geo_r1.train.serve, "find_spec", lambda name: None)
    assert "there is no vLLM beside geo_r1 here" in refused(tmp_path, capfd, "--serve")


def test_mistakes_are_found_before_torch_is_imported(tmp_path):
    program = (
        "import sys, geo_r1.train.serve as serve; from geo_r1.train.__main__ import main\n"
        "serve.find_spec = lambda name: None\n"
        "assert main(sys.argv[1:]) == 2 and 'torch' not in sys.modules"
    )
    argv = [str(runs.empty_recipe(tmp_path)), "--serve"]
    subprocess.run([sys.executable, "-c", program, *argv], check=True, capture_output=True, timeout=60)
