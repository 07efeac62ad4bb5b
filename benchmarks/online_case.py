"""What the PPO and GRPO benchmarks run: models of random weights, prompts, and how much arithmetic
an episode needs.

Imported by all workers of `make bench-peers`, so nothing beyond the standard library is
imported here at the top.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sft_case

LONGEST_PROMPT = 200
TEMPERATURE = 0.7
CLIP = 0.2
KL = 0.05
LEARNING_RATE = 1e-6
MAX_NORM = 1.0
BETAS = (0.9, 0.95)
ROLES = (
    "model",
    "reward",
)  # folders: the policy and its reference; the reward model and the critic


@dataclass(frozen=True)
class Size:
    """One episode: ``prompts`` prompts with ``generations`` answers of ``new`` tokens each,
    ``passes`` over them."""

    prompts: int
    new: int
    generations: int = 1
    passes: int = 1

    @property
    def answers(self) -> int:
        return self.prompts * self.generations


SIZES = {"ppo": Size(prompts=8, new=48), "grpo": Size(prompts=2, new=64, generations=4)}


class Clock:
    """Time of one episode, on the wall and of this process's processors."""

    def start(self) -> None:
        self.wall = time.perf_counter()
        self.processor = time.process_time()

    def read(self) -> dict[str, float]:
        wall = time.perf_counter() - self.wall
        processor = time.process_time() - self.processor
        return {"seconds": wall, "processor_seconds": processor}


def prepare(folder: Path | None = None, shape: str = "28M") -> Path:
    """A folder with ``model/`` and ``reward/`` (of ``shape``, a key of bench_ppo.SHAPES; seed 0),
    tokenizers included, and ``prompts.jsonl``: eight prompts of examples/data/prompt.jsonl as text
    and SmolLM2's token ids, the longest that 200 tokens hold."""
    folder = folder or sft_case.CACHE / ("online" if shape == "28M" else f"online-{shape}")
    if (folder / "prompts.jsonl").exists():
        return folder
    from benchmarks.bench_ppo import SHAPES
    from benchmarks.preference_case import write_models
    from coati.dataset import setup_conversation_template
    from coati.dataset.data_types import DATA_TYPES
    from coati.dataset.rows.formats import read_row
    from coati.models import load_tokenizer

    tokenizer = load_tokenizer(str(sft_case.prepare() / "model"))
    path = sft_case.ROOT / "config" / "conversation_template" / sft_case.TEMPLATE
    template = setup_conversation_template(tokenizer, str(path))
    lines = open(sft_case.ROOT / "examples" / "data" / "prompt.jsonl", encoding="utf-8")
    made = [
        DATA_TYPES["prompt"].tokenize(read_row("prompt", json.loads(line)), template, 10_000)[0][0]
        for line in lines
    ]
    fitting = [row for row in made if row["seq_length"] <= LONGEST_PROMPT]
    chosen = sorted(fitting, key=lambda row: -row["seq_length"])[: SIZES["ppo"].prompts]
    write_models(folder, SHAPES[shape])
    for role in ROLES:
        tokenizer.save_pretrained(folder / role)
    rows = [{"text": row["inputs_decode"], "input_ids": row["input_ids"]} for row in chosen]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def read(folder: Path, size: Size) -> list[dict[str, Any]]:
    """The prompts of every episode: each has the same ones, so an episode is the same work as every
    other."""
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: size.prompts]]


def score(completions: list[str], **others: Any) -> list[float]:
    """The reward of GRPO in both systems: the share of an answer's characters that are letters."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]


def phase_flops(
    algorithm: str, size: Size, prompts: list[int], model: dict[str, int] | None = None
) -> dict[str, float]:
    """Floating-point operations that the phases of an episode need, by mathematics, not by
    implementation; see sft_case.flops.

    ``prompts``: tokens of each. A forward pass takes every token once: the policy's while it
    samples (log-probs included), the reference's, reward model's and critic's (PPO); an update is
    three times a forward pass, of policy and critic. The vocabulary is multiplied at answers'
    tokens alone. The prompt of a group is read once for sampling.
    """
    model = model or sft_case.MODEL
    hidden = model["hidden_size"]
    layers = model["num_hidden_layers"]
    weights = sft_case.block_weights(model)

    def body(tokens: int, square: int) -> float:
        return 2.0 * weights * tokens + 2.0 * layers * hidden * square

    ends = [prompt + size.new for prompt in prompts]
    whole = size.generations * body(sum(ends), sum(end * end for end in ends))
    # While sampling, the prompt's part of it is there once for each group.
    asked = body(sum(prompts), sum(prompt * prompt for prompt in prompts))
    head = 2.0 * hidden * model["vocab_size"] * size.answers * size.new
    sampling = whole - (size.generations - 1) * asked + head
    if algorithm == "grpo":
        return {"rollout": sampling, "scoring": 0.0, "update": size.passes * 3 * (whole + head)}
    return {
        "rollout": sampling,
        "scoring": (whole + head) + 2 * whole,
        "update": size.passes * 3 * (2 * whole + head),
    }


def flops(
    algorithm: str, size: Size, prompts: list[int], model: dict[str, int] | None = None
) -> float:
    """Of all phases of an episode."""
    return sum(phase_flops(algorithm, size, prompts, model).values())
