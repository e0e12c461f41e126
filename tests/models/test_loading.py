"""A model folder whose files do not fit, or are no such files, is one line that names the file."""

import json
import resource
import shutil
import signal

import pytest
import torch

from geo_r1.errors import UserError
from geo_r1.models import load_model
from geo_r1.models.loading import stored_dtype
from geo_r1.models.tiny import build_tiny

# Files, and what an error calls them.
JSON_FILES = {
    "config.json": ("config.json",),
    "generation_config.json": ("generation_config.json", "its weights"),
    "tokenizer_config.json": ("its tokenizer",),
    "tokenizer.json": ("its tokenizer",),
    "preprocessor_config.json": ("preprocessor_config.json",),
}
OTHERS = ("[1]", "null", "7", '"text"', "{", "\x00\xff", "[" * 3000, "")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for part in build_tiny(["user\n", "assistant\n", "where?"], hidden_size=32, num_layers=1):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


def fault(folder, **options) -> str:
    with pytest.raises(UserError) as e:
        load_model(folder, **options)
    text = str(e.value)
    assert len(text) < 600 and "\n" not in text
    assert text.startswith(f"model {folder} cannot be loaded: ")
    return text.removeprefix(f"model {folder} cannot be loaded: ")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("file", JSON_FILES)
def test_a_file_of_another_kind_is_one_line(file, weights, folder):
    for text in OTHERS:
        (folder / file).write_text(text, encoding="latin-1")
        try:
            load_model(folder, weights=weights)
        except UserError as error:
            starts = [f"model {folder} cannot be loaded: {part}: " for part in JSON_FILES[file]]
            assert str(error).startswith(tuple(starts)), (text, str(error))


def edited(folder, file, **changes):
    values = json.loads((folder / file).read_text())
    for name, value in changes.items():
        table = values
        *path, last = name.split("__")
        for key in path:
            table = table[key]
        table[last] = value
    (folder / file).write_text(json.dumps(values))


IMAGES = "preprocessor_config.json"
MISFITS = {
    "patch": (IMAGES, {"patch_size": 16}, "patch_size is 16, but the model's vision_config has patch_size"),
    "merge": (IMAGES, {"merge_size": 1}, "merge_size is 1, but the model's vision_config has spatial_merge"),
    "time": (IMAGES, {"temporal_patch_size": 1}, "temporal_patch_size is 1, but"),
    "text": ("config.json", {"text_config": None}, "text_config must be a table, it is None"),
    "vision": ("config.json", {"vision_config": [1]}, "vision_config must be a table, it is [1]"),
    "family": ("config.json", {"model_type": "llava"}, "it is a llava; supported: "),
    "code": (
        "config.json",
        {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}},
        "it is a mine; supported: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_parts_that_do_not_fit_are_named(misfit, folder):
    file, changes, reason = MISFITS[misfit]
    edited(folder, file, **changes)
    (folder / "configuration_mine.py").write_text("raise SystemExit('ran')")
    assert fault(folder, weights=False).startswith(f"{file}: {reason}")


def test_a_tokenizer_larger_than_the_embedding(folder):
    _, tokenizer, _ = load_model(folder)
    size = len(tokenizer)
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)
    assert fault(folder) == f"its tokenizer: it has {size + 9} tokens, but the model embeds {size}"


@pytest.mark.parametrize(("template", "count"), [("{{ messages[0].role }}", 0), ("<|image_pad|>" * 2, 2)])
def test_a_template_that_writes_no_marker_or_two(template, count, folder):
    (folder / "chat_template.jinja").write_text(template)
    reason = f"its chat template writes <|image_pad|> {count} times for one image"
    assert fault(folder) == f"its tokenizer: {reason}"


@pytest.mark.parametrize("template", ["{% if %}", "{{ 1 / 0 }}", "{{ messages.x.y }}"])
def test_a_broken_template(template, folder):
    (folder / "chat_template.jinja").write_text(template)
    assert fault(folder).startswith("its tokenizer: ")


DOUBLED = "{% for i in range(36) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "has not ended after 1 s of computing"),
        ("{% set ns = namespace(x='abcdefgh') %}" + DOUBLED, "takes all memory"),
        ("{{ 'a' * 20000000 }}", "makes 20,000,000 characters of the messages, more than 16,777,216"),
    ],
    ids=["endless", "memory", "long"],
)
def test_a_template_without_end(template, reason, folder, monkeypatch):
    monkeypatch.setattr("geo_r1.models.chat.MAX_SECONDS", 1)
    monkeypatch.setattr("geo_r1.models.chat.MAX_MEMORY", 1 << 28)
    (folder / "chat_template.jinja").write_text(template)

    def state():
        timer = signal.getitimer(signal.ITIMER_VIRTUAL)
        return resource.getrlimit(resource.RLIMIT_AS), timer, signal.getsignal(signal.SIGVTALRM)

    before = state()
    assert fault(folder) == f"its tokenizer: its chat template {reason}"
    assert state() == before


def test_a_lack_of_memory_is_no_fault_of_a_file(folder, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("geo_r1.models.loading.AutoTokenizer.from_pretrained", full)
    with pytest.raises(MemoryError):
        load_model(folder)


def test_weights_that_would_be_unpickled_are_not_read(folder):
    model, *_ = load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in fault(folder)


def test_the_dtype_of_a_checkpoint(folder):
    assert stored_dtype(folder) == torch.float32
    edited(folder, "config.json", dtype="bfloat16")
    assert stored_dtype(folder) == torch.bfloat16
