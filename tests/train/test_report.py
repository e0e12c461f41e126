"""The run report: what it shows, that it stands alone, and that untrusted text stays text."""

import base64
import json
import re

import pytest
from PIL import Image

from geo_r1.errors import UserError
from geo_r1.train.report.embedded import ShownImage, split_completion, views
from geo_r1.train.report.metrics import read_metrics
from geo_r1.train.report.page import read_gallery, write_report
from geo_r1.train.report.plots import draw_plots
from geo_r1.train.report.plots import number as number_text

GRPO_PLOTS = {"reward", "accuracy", "length", "kl", "entropy", "no_signal", "time", "throughput"}
SFT_PLOTS = {"loss", "throughput", "learning_rate", "grad_norm"}
COMPLETIONS = {
    "base": "<script>alert('x')</script> & \"quoted\"",
    "sft": "<think>A water water same.</think>\n<answer>B</answer>",
    "grpo": "<think>C park park same.</think>\n<answer>C</answer>",
}
PREDICTIONS = {"base": None, "sft": "B", "grpo": "C"}


def sft_line(stage, step):
    return {"stage": stage, "step": step, "loss": 3 / step,
            "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0,
            "time/step": 0.5}  # fmt: skip


def grpo_line(step):
    return {"stage": "grpo", "step": step, "loss": 0.01, "reward": step / 50, "reward_std": 0.3,
            "frac_reward_zero_std": 0.1, "rewards/accuracy/mean": step / 60, "rewards/format/mean": 0.9,
            "completions/mean_length": 40 + step, "kl": 0.001 * step, "entropy": 1 / step,
            "tokens_per_second": 700.0, "time/rollout": 2.0, "time/reward": 0.1, "time/update": 1.0,
            "time/reference": 0.3}  # fmt: skip


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def gallery_line(row, number):
    return {"id": f"sample-{number}", "city": "Łódź", "answer": "C", "prediction": PREDICTIONS[row],
            "images": [f"eval/images/{number}_{i}.png" for i in range(4)],
            "labels": ["panorama", "A", "B", "C"], "correct": row == "grpo", "completion": COMPLETIONS[row],
            "completion_length": 17,
            "prompt": "<image> A<image> Which <b>tile</b>?",
            "rewards": {"accuracy": float(row == "grpo"), "format": 0.5}}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """A finished run named "world", without its metrics: plots take a second to draw."""
    root = tmp_path / "world"
    root.mkdir()
    (root / "recipe.toml").write_text('[model]\nname = "tiny <qwen>"\n')
    rows = {
        row: {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.03, accuracy + 0.04],
              "completion_length": 5.25, "well_formed": 0.5, "num_samples": 1500, "chance": 0.25}
        for row, accuracy in {"base": 0.2, "sft": 0.413, "grpo": 0.91}.items()
    }  # fmt: skip
    (root / "summary.json").write_text(json.dumps(rows))
    (root / "eval/images").mkdir(parents=True)
    for number in range(2):
        for i in range(4):
            size = (112, 28) if i == 0 else (56, 56)
            Image.new("RGB", size, (60 * i, 80 * number, 90)).save(root / f"eval/images/{number}_{i}.png")
    for row in COMPLETIONS:
        write_lines(root / f"eval/{row}/gallery.jsonl", [gallery_line(row, number) for number in range(2)])
    return root


@pytest.fixture
def full_run(run_dir):
    """The same with the metrics of three stages."""
    stages = [sft_line(stage, step) for stage in ("pretrain", "sft") for step in range(1, 31)]
    write_lines(run_dir / "metrics.jsonl", stages + [grpo_line(step) for step in range(1, 31)])
    return run_dir


def page_of(run_dir):
    report = write_report(run_dir)
    assert report == run_dir / "report.html"
    return report.read_text(encoding="utf-8")


def plot_names(run_dir):
    return {path.stem for path in run_dir.glob("plots/*.png")}


def test_page_stands_alone(full_run):
    page = page_of(full_run)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "default-src 'none'" in page
    assert [path.name for path in full_run.iterdir() if path.name.startswith(".report")] == []


def test_images_are_embedded_once_a_sample(run_dir):
    page = page_of(run_dir)
    for path in run_dir.glob("eval/images/*.png"):
        assert page.count(base64.b64encode(path.read_bytes()).decode()) == 1
    assert page.count('<img class="tiny"') == 8
    assert page.count('class="candidate true"') == 2


def test_completions_are_text_not_markup(run_dir):
    page = page_of(run_dir)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;" in page
    assert '<span class="think">&lt;think&gt;A water water same.&lt;/think&gt;</span>' in page
    assert '<span class="answer">&lt;answer&gt;B&lt;/answer&gt;</span>' in page
    assert "tiny &lt;qwen&gt;" in page and "<qwen>" not in page


def test_every_untrusted_field_is_escaped(run_dir):
    evil = "\"><img src=x onerror='y'>"
    record = gallery_line("grpo", 0) | {"id": evil, "city": evil, "answer": evil, "prediction": evil}
    record |= {"labels": ["panorama", "A", "B", evil], "rewards": {evil: 1.0}}
    write_lines(run_dir / "eval/grpo/gallery.jsonl", [record])
    assert "<img src=x" not in page_of(run_dir)


def test_table_shows_the_numbers(run_dir):
    table = re.search(r"<tbody>.*</tbody>", page_of(run_dir), re.DOTALL).group()
    assert re.findall(r'class="name">(\w+)', table) == ["base", "sft", "grpo"]
    for text in ("20.0 %", "41.3 %", "91.0 %", "17.0 – 24.0 %", "88.0 – 95.0 %", "5.2", "50.0 %", "1,500"):
        assert text in table
    assert "left: 38.30%; width: 7.00%" in table
    assert table.count('class="chance" style="left: 25.00%"') == 3


def test_gallery_sets_rows_side_by_side(run_dir):
    samples = read_gallery(run_dir, order=["base", "sft", "grpo"])
    assert [sample["id"] for sample in samples] == ["sample-0", "sample-1"]
    for sample in samples:
        attempts = [(made["row"], made["prediction"], made["correct"]) for made in sample["attempts"]]
        assert attempts == [("base", None, False), ("sft", "B", False), ("grpo", "C", True)]
        assert [image.label for image in sample["images"]] == ["panorama", "A", "B", "C"]
    page = page_of(run_dir)
    assert page.count('<span class="vote">sft</span>') == 2
    assert page.count('<span class="vote correct">grpo</span>') == 2
    assert page.count("✗ no answer") == 2 and "Łódź" in page
    assert '<span class="chip">format <b>0.50</b></span>' in page


def test_plots_are_saved(full_run):
    page = page_of(full_run)
    assert plot_names(full_run) == GRPO_PLOTS | SFT_PLOTS
    assert page.count('src="data:image/svg+xml;base64,') == len(GRPO_PLOTS | SFT_PLOTS)
    for path in full_run.glob("plots/*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_plots_show_the_values(full_run):
    figures = draw_plots(read_metrics(full_run / "metrics.jsonl")[0], chance=0.25)
    lines = {line.get_label(): line for line in figures["accuracy"].axes[0].get_lines()}
    raw = figures["accuracy"].axes[0].get_lines()[0]
    assert raw.get_xdata().tolist() == list(range(1, 31))
    assert raw.get_ydata() == pytest.approx([100 * step / 60 for step in range(1, 31)])
    assert lines["accuracy"].get_ydata()[1:-1] == pytest.approx([100 * step / 60 for step in range(2, 30)])
    assert lines["chance"].get_ydata() == pytest.approx([25, 25])
    legend = figures["time"].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["rollout", "reward", "reference", "update"]
    assert figures["time"].axes[0].dataLim.y1 == pytest.approx(3.4)


@pytest.mark.parametrize("num_steps", [1, 2, 500])
def test_short_and_long_runs_draw(num_steps, tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [grpo_line(step) for step in range(1, num_steps + 1)])
    write_report(tmp_path)
    assert plot_names(tmp_path) == GRPO_PLOTS - ({"time"} if num_steps == 1 else set())


def test_many_long_reward_names_fit(tmp_path):
    long_names = {f"rewards/{'a_rather_long_name_' * 3}{i}/mean": i for i in range(9)}
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "grpo", "step": step} | long_names for step in (1, 2)])
    write_report(tmp_path)
    assert plot_names(tmp_path) == {"reward"}


def test_before_grpo(run_dir):
    write_lines(run_dir / "metrics.jsonl", [sft_line("sft", step) for step in range(1, 4)])
    (run_dir / "eval/grpo/gallery.jsonl").unlink()
    page = page_of(run_dir)
    assert plot_names(run_dir) == SFT_PLOTS
    assert "sft 3 steps" in page and "✓" not in page


def test_empty_run(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = page_of(tmp_path)
    assert tmp_path.name in page and "No step logged yet" in page
    assert "<table" not in page and "<img" not in page and "<details" not in page
    assert not (tmp_path / "plots").exists()


def test_missing_values_and_images(run_dir):
    (run_dir / "summary.json").write_text(json.dumps({"base": {"accuracy": 0.2}, "sft": {}}))
    (run_dir / "eval/images/0_1.png").unlink()
    (run_dir / "eval/images/0_2.png").write_bytes(b"not an image")
    write_lines(run_dir / "metrics.jsonl", [{"stage": "grpo", "step": 1, "reward": float("nan"), "kl": 0.1}])
    page = page_of(run_dir)
    assert page.count('class="missing"') == 2
    assert page.count('class="chance"') == 0 and page.count('class="interval"') == 0
    assert plot_names(run_dir) == {"kl"}


def test_large_image_is_shrunk(run_dir):
    Image.effect_noise((3000, 750), 50).save(run_dir / "eval/images/0_0.png")
    (encoded,) = re.findall(r"data:image/jpeg;base64,([^\"]*)", page_of(run_dir))
    (run_dir / "small.jpg").write_bytes(base64.b64decode(encoded))
    with Image.open(run_dir / "small.jpg") as image:
        assert image.size == (1024, 256)


def test_cut_last_line_is_ignored(full_run):
    for path in (full_run / "metrics.jsonl", full_run / "eval/sft/gallery.jsonl"):
        before = path.read_bytes()
        path.write_bytes(before + '{"stage": "grpo", "city": "Łó'.encode()[:-1])
    assert len(read_metrics(full_run / "metrics.jsonl")[0]["grpo"]) == 30
    assert "grpo 30 steps" in page_of(full_run)


def test_repeated_step_keeps_the_last(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [sft_line("sft", 1), sft_line("sft", 1) | {"loss": 9}])
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["sft"][1]["loss"] == 9.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("eval/sft/gallery.jsonl", '{"id": "x", "images": [], "labels": []}\n', "lacks answer, correct"),
        (
            "eval/sft/gallery.jsonl",
            json.dumps(gallery_line("sft", 0) | {"labels": ["A"]}),
            "4 images, 1 labels",
        ),
        ("summary.json", '{"rows"', "unreadable JSON"),
        ("summary.json", "[]", "object of rows"),
    ],
)
def test_bad_files_are_named(run_dir, name, text, message):
    (run_dir / name).write_text(text)
    with pytest.raises(UserError, match=f"{name.split('/')[-1]}.*{message}"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: expected the folder of a run"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("B", [("text", "B")]),
        ("a<think>b</think>c<answer>d</answer>e",
         [("text", "a"), ("think", "<think>b</think>"), ("text", "c"),
          ("answer", "<answer>d</answer>"), ("text", "e")]),
        ("b\n</think> c", [("think", "b\n</think>"), ("text", " c")]),
        ("<think>cut", [("think", "<think>cut")]),
        ("<answer>B</answer></think>", [("answer", "<answer>B</answer>"), ("text", "</think>")]),
    ],
)  # fmt: skip
def test_split_completion(text, parts):
    assert split_completion(text) == parts


def test_lone_surrogate_in_a_completion(run_dir):
    write_lines(run_dir / "eval/sft/gallery.jsonl", [gallery_line("sft", 0) | {"completion": "a\ud800b"}])
    assert "a?b" in page_of(run_dir)


def test_lines_without_figures_are_counted_on_the_page(run_dir):
    rows = [json.dumps(sft_line("sft", step)) for step in (1, 2, 3)]
    (run_dir / "metrics.jsonl").write_bytes("\n7\n".join(rows).encode() + b"\n\xff\x00")
    page = page_of(run_dir)
    assert "sft 3 steps" in page and "left out: 3." in page


def test_the_page_says_when_where_and_with_what(run_dir):
    facts = {"started": "2026-12-01T01:17:18+00:00", "sessions": 2, "seconds": 3725.4, "ranks": 8}
    facts |= {"threads": 1, "code": "geo_r1 0.2.0, commit abc1234", "hardware": "<H200>"}
    (run_dir / "run.json").write_text(json.dumps(facts | {"versions": "Python 3.11.7, torch 2.13.0"}))
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page_of(run_dir)))
    assert shown == {
        "started": "2026-12-01 01:17:18+00:00",
        "ran for": "1:02:05, in 2 sessions",
        "code": "geo_r1 0.2.0, commit abc1234",
        "hardware": "&lt;H200&gt;",
        "ranks": "8 ranks, 1 thread each",
        "versions": "Python 3.11.7, torch 2.13.0",
    }


def test_each_sample_has_its_question(run_dir):
    page = page_of(run_dir)
    assert (
        page.count('<pre class="prompt">&lt;image&gt; A&lt;image&gt; Which &lt;b&gt;tile&lt;/b&gt;?</pre>')
        == 2
    )


@pytest.mark.parametrize(
    ("aspects", "lead"),
    [([], False), ([0.7], True), ([1, 1], False), ([3, 1, 1], True), ([3, 1, 2.5], False), ([2] * 11, False)],
)
def test_any_number_of_images_has_a_layout(aspects, lead):
    images = [ShownImage(f"{i}", "data:", False, aspect) for i, aspect in enumerate(aspects)]
    found = views(images)
    assert [found["lead"], *found["tiles"]] == ([None] * (not lead)) + images


def test_plots_are_dark_on_a_dark_page(full_run):
    for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page_of(full_run)):
        svg = base64.b64decode(data).decode()
        style, rest = svg.split("</style>", 1)
        assert "@media(prefers-color-scheme:dark){:root{--c0:" in style
        assert not re.search(r"#(?!000000|ffffff)[0-9a-f]{6}", re.sub(r'"#[^"]*"|url\(#.*?\)', "", rest))


def test_rates_far_apart_share_a_logarithmic_axis(tmp_path):
    rows = [sft_line("sft", step) for step in (1, 2)]
    rows += [grpo_line(step) | {"learning_rate": 1e-6 * (step - 1)} for step in (1, 2, 3)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    axes = draw_plots(read_metrics(tmp_path / "metrics.jsonl")[0])["learning_rate"].axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_lines()[2].get_xdata().tolist() == [2, 3]  # a rate of zero has no logarithm


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "grpo", "step": 1, r"rewards/$\frac/mean": 1.0}])
    write_report(tmp_path)
    assert plot_names(tmp_path) == {"reward"}


def test_no_power_of_ten_stands_above_an_axis(tmp_path):
    row = {"stage": "grpo", "reward": 1.0}
    rows = [row | {"step": i, "sampling/logp_difference/mean": (8 + i) * 1e-6} for i in range(1, 5)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    for figure in draw_plots(read_metrics(tmp_path / "metrics.jsonl")[0]).values():
        figure.draw_without_rendering()
        assert figure.axes[0].yaxis.get_offset_text().get_text() == ""


@pytest.mark.parametrize(
    ("value", "text"), [(1000, "1,000"), (1650.4, "1,650"), (1e-6, "1e-6"), (0.25, "0.25"), (0, "0")]
)
def test_numbers_have_no_power_of_ten_where_none_is_needed(value, text):
    assert number_text(value) == text


def test_a_page_is_written_even_if_its_plots_are_not(full_run):
    (full_run / "plots").touch()
    with pytest.raises(FileExistsError, match="plots"):
        write_report(full_run)
    assert "grpo 30 steps" in (full_run / "report.html").read_text(encoding="utf-8")
