"""A reward function of your own, named in the recipe as module:function. Half a minute on a CPU.

    python examples/own_reward.py FOLDER

It has TRL's signature: completions first, then every column of the data by name, one number for each
completion; None leaves a completion without a score.
"""

import json
import sys
from pathlib import Path

from geo_r1.train.__main__ import main as train

RECIPE = """
[run]
stages = ["grpo"]  # from random weights: enough to see a reward move
threads = 1

[grpo]
steps = 12
prompts_per_step = 2
optim = { lr = 2e-3 }

[rollout]
max_new_tokens = 12

[rewards]
functions = ["own_reward:letters"]
options = { "own_reward:letters" = { wanted = "e" } }
"""


def letters(completions, *, wanted, **columns):
    """The share of a completion's characters that are the wanted letter."""
    texts = [messages[0]["content"] for messages in completions]
    return [text.count(wanted) / max(len(text), 1) for text in texts]


def main(folder):
    recipe = folder / "own_reward.toml"
    recipe.write_text(RECIPE)
    code = train([str(recipe), f"--run.dir={folder / 'run'}"])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows]
    print(f"mean reward: first steps {sum(rewards[:3]) / 3:.4f}, last steps {sum(rewards[-3:]) / 3:.4f}")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
