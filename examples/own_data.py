"""Data of your own, made on the spot: which of two tiles has the colour of the photograph? A minute on a CPU.

    python examples/own_data.py FOLDER

Each row of JSONL is a sample. Each `<image>` in the prompt stands for one image, in order; paths start at
the file's folder.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image

from geo_r1.train.__main__ import main as train

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 80, 220), "white": (240, 240, 240)}
RECIPE = """
[run]
stages = ["sft", "grpo", "eval"]
threads = 1

[sft]
steps = 40
batch_size = 16
optim = { lr = 2e-3 }

[grpo]
steps = 4
prompts_per_step = 4

[rollout]
max_new_tokens = 32

[rewards]
functions = ["accuracy", "format"]

[eval]
num_samples = 32
max_new_tokens = 32
"""


def write_data(folder, count, seed):
    """Draw images and write rows that name them; returns the JSONL file."""
    draw, rows, file = random.Random(seed), [], folder / "data.jsonl"
    folder.mkdir(parents=True)
    for number in range(count):
        (right, wrong), answer = draw.sample(sorted(COLORS), 2), draw.choice("AB")
        tiles = (right, wrong) if answer == "A" else (wrong, right)
        images = [f"{number}-{name}.png" for name in ("photo", "a", "b")]
        for name, color in zip(images, (right, *tiles), strict=True):
            Image.new("RGB", (56, 56), COLORS[color]).save(folder / name)
        thought = f"<think>The photo is {right}, and so is {answer}.</think>"
        row = {"prompt": "Photo: <image> A: <image> B: <image> Which tile shows the same place?"}
        row |= {"images": images, "response": f"{thought}<answer>{answer}</answer>"}
        rows.append(row | {"answer": answer, "num_choices": 2})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def main(folder):
    learn, test = write_data(folder / "train", 128, 0), write_data(folder / "test", 32, 1)
    recipe = folder / "own_data.toml"
    recipe.write_text(RECIPE)
    data = [f"--sft.data={learn}", f"--grpo.data={learn}", f"--eval.data={test}"]
    return train([str(recipe), f"--run.dir={folder / 'run'}", *data])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
