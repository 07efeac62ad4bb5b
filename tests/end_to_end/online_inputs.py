"""What runs of PPO and GRPO start from: prompts, conversations, a reward model and reward
functions, all tiny."""

import json
from pathlib import Path
from typing import Any

from tests.end_to_end.inputs import ROOT, of_family, prepare, short_lines
from tests.tiny import CHATML, tiny_llama

PROMPTS = ROOT / "examples" / "data" / "prompt.jsonl"
NEW = 10  # tokens of the longest response
MAX_LENGTH = 84
# So many ways to end that a random model finds one now and then, of one and of two tokens.
STOPS = [
    [2],
    *([token] for token in range(40, 64)),
    *([token, token + 1] for token in range(100, 140)),
]
TIMES = ("seconds_", "per_second", "mfu", "memory/", "_mb")  # what no two runs share
FUNCTIONS = '''
import os

def vowels(responses, lengths):
    """Scores that differ from response to response."""
    return [
        sum(letter in "aeiou" for letter in text) + length / 7
        for text, length in zip(responses, lengths)
    ]

def raises(responses):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("no judge today")
    return [0.0] * len(responses)

def is_nan(responses):
    second = os.environ.get("RANK") == "1"
    return [float("nan") if i == 2 and second else 0.0 for i in range(len(responses))]

def too_few(responses):
    return [0.0] * (len(responses) - (os.environ.get("RANK") == "1"))
'''


ENVIRONMENT = '''
from coati.environments import Environment, Turn

class Echo(Environment):
    """Says "more" to all responses; the longer they are, the better."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def reset(self, row):
        self.seed = row["seed"]
        return row["messages"]

    def step(self, response):
        reward = self.scale * len(response["content"]) / 9
        return Turn([{"role": "user", "content": "more"}], reward)

class Louder(Echo):
    pass

class Fails(Echo):
    def step(self, response):
        raise RuntimeError("no more")
'''


def prompts(folder: Path, count: int = 24, first: int = 0) -> str:
    """The arrow directory of ``count`` short prompts of the sample."""
    lines = short_prompts()[first : first + count]
    return prepare(folder, "".join(lines), MAX_LENGTH, "prompt")


def short_prompts() -> list[str]:
    """Those of the sample that are short, a line each."""
    lines = short_lines(0, 200, PROMPTS).splitlines(keepends=True)
    return [line for line in lines if len(line) < 140]


def write_reward_model(
    folder: Path, kind: str = "RewardModel", family: str | None = None, seed: int = 3
) -> str:
    """A directory of the kind: another random Llama, or the tiny model of ``family``,
    with a head that tells responses apart."""
    import torch
    from safetensors.torch import save_file

    from coati import models

    backbone = tiny_llama(seed=seed) if family is None else of_family(family)
    model = getattr(models, kind)(backbone=backbone)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return str(folder)


def write_files(folder: Path) -> dict[str, str]:
    """``template``: a conversation template with :data:`STOPS`; ``functions``: a file of reward
    functions."""
    template = {
        "chat_template": CHATML,
        "system_message": "",
        "stop_ids": STOPS,
        "end_of_assistant": "<|im_end|>",
    }
    (folder / "template.json").write_text(json.dumps(template))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "echo.py").write_text(ENVIRONMENT)
    (folder / "rows.jsonl").write_text("".join(short_prompts()[:24]))
    named = {"template": "template.json", "functions": "functions.py", "echo": "echo.py"}
    named["rows"] = "rows.jsonl"
    return {name: str(folder / file) for name, file in named.items()}


def metrics(save_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory."""
    lines = [
        json.loads(line) for line in (Path(save_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    kept = [
        {name: value for name, value in line.items() if not any(t in name for t in TIMES)}
        for line in lines
    ]
    return [line for line in kept if line.keys() != {"step"}]


def of_episode(lines: list[dict[str, Any]], episode: int, kind: str = "train") -> dict[str, float]:
    """What was logged under ``kind``/ for an episode."""
    (found,) = [
        line for line in lines if line["step"] == episode and any(k.startswith(kind) for k in line)
    ]
    return {
        name.removeprefix(f"{kind}/"): value
        for name, value in found.items()
        if name.startswith(kind)
    }


def weights(save_dir: Path) -> dict[str, bytes]:
    """Contents of the files of weights of the final models, by model and file."""
    files = sorted(Path(save_dir).glob("*/modeling/*.safetensors"))
    return {f"{file.parent.parent.name}/{file.name}": file.read_bytes() for file in files}
