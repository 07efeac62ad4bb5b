"""What the preference benchmarks run: models, pairs as token ids, and one training step of each way
to be compared.

Imported by all workers of `make bench-peers`, so nothing beyond the standard library is imported
here at the top.
"""

import json
import random
from pathlib import Path

from benchmarks import sft_case

LEARNING_RATE = 1e-5
MAX_NORM = 1.0
BETAS = (0.9, 0.95)
BETA = 0.1
# mean tokens of the made pairs: prompts twice as long as answers
PROMPT = 256
ANSWER = 128
SPREAD = 0.25  # their lengths differ by up to this share of the mean


def made(vocab_size: int, rows: int = 256, shape: str = "28M") -> Path:
    """A folder with ``model/`` (the model of bench_ppo.SHAPES with another vocabulary), ``reward/``
    and ``pairs.jsonl`` of random tokens."""
    sized = "" if shape == "28M" else f"-{shape}"
    folder = sft_case.CACHE / f"pairs-{vocab_size}-{PROMPT}-{ANSWER}{sized}"
    if (folder / "pairs.jsonl").exists():
        return folder
    generator = random.Random(0)

    def some(mean: int) -> list[int]:
        count = round(mean * generator.uniform(1 - SPREAD, 1 + SPREAD))
        return [generator.randrange(3, vocab_size) for _ in range(count)]

    pairs = [
        {"prompt_ids": some(PROMPT), "chosen_ids": some(ANSWER), "rejected_ids": some(ANSWER)}
        for _ in range(rows)
    ]
    from benchmarks.bench_ppo import SHAPES

    write_models(folder, SHAPES[shape] | {"vocab_size": vocab_size})
    _write(folder, pairs)
    return folder


def real(tokenizer_dir: str | None = None, shape: str = "28M") -> Path:
    """The same with the pairs of examples/data/preference.jsonl, in the file's order, as SmolLM2's
    token ids. ``shape``: of bench_ppo.SHAPES."""
    folder = sft_case.CACHE / ("pairs" if shape == "28M" else f"pairs-{shape}")
    if (folder / "pairs.jsonl").exists():
        return folder
    from coati.dataset import load_tokenized_dataset, prepare_dataset, setup_conversation_template
    from coati.models import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir or str(sft_case.prepare() / "model"))
    template = sft_case.ROOT / "config" / "conversation_template" / sft_case.TEMPLATE
    prepare_dataset(
        inputs=[sft_case.ROOT / "examples" / "data" / "preference.jsonl"],
        type="preference",
        tokenizer=tokenizer,
        template=setup_conversation_template(tokenizer, str(template)),
        arrow_dir=folder / "arrow",
        max_length=512,
        num_bins=1,
        show=None,
    )
    pairs = []
    for row in load_tokenized_dataset(str(folder / "arrow")):
        start = row["chosen_loss_mask"].index(True)
        prompt, chosen, rejected = (
            row["chosen_input_ids"][:start],
            *(row[f"{s}_input_ids"] for s in SIDES),
        )
        # Whoever takes prompt and answers apart must find one prompt; a mask may end before its
        # row.
        if rejected[:start] == prompt and row["rejected_loss_mask"].index(True) == start:
            ends = [
                len(row[f"{s}_loss_mask"]) - row[f"{s}_loss_mask"][::-1].index(True) for s in SIDES
            ]
            answers = (chosen[start : ends[0]], rejected[start : ends[1]])
            pairs.append(
                {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}
            )
    from benchmarks.bench_ppo import SHAPES

    write_models(folder, SHAPES[shape])
    tokenizer.save_pretrained(folder / "model")
    _write(folder, pairs)
    return folder


SIDES = ("chosen", "rejected")


def write_models(folder: Path, config: dict) -> None:
    """``model/``, a language model of random weights, and ``reward/``, a reward model on it; seed
    0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from coati.models import RewardModel

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(folder / "model")
    reward = RewardModel(backbone=model)
    reward.config.save_pretrained(folder / "reward")
    state = {name: tensor.contiguous() for name, tensor in reward.state_dict().items()}
    from safetensors.torch import save_file

    save_file(state, folder / "reward" / "model.safetensors", metadata={"format": "pt"})


def _write(folder: Path, pairs: list[dict]) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def read(folder: Path, count: int) -> list[dict]:
    """The first ``count`` pairs, from the beginning again where they end."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [pairs[index % len(pairs)] for index in range(count)]


def counted(pairs: list[dict]) -> dict[str, int]:
    """Real tokens of both sides, and how many of them are supervised."""
    answers = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return {
        "tokens": answers + 2 * sum(len(pair["prompt_ids"]) for pair in pairs),
        "supervised": answers,
    }
