"""Steps that profile_step.py and bench_growth.py take: each case is an ordinary engine's step
through the library, as the other benchmarks make it, the same work every time.

A case is given a ``recorder``: it calls ``begin()`` before and ``end()`` after each of the
recorder's steps, and returns what the step works on.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import online_case, preference_case, sft_case, work_floors
from benchmarks.bench_ppo import SHAPES
from benchmarks.work_floors import Work

PAIRS = 8
DECODING = {"prompt": 64, "short": 1, "long": 49}  # tokens
DECODE_ROWS = (1, 8, 16, 32)


class Recorder(Protocol):
    """Who measures the steps."""

    steps: int

    def begin(self, kind: str = "step") -> None:
        """A step of ``kind`` comes."""

    def end(self, **found: float) -> None:
        """It is over; ``found``: what else is known of it."""


@dataclass
class Done:
    """What each step of a case worked on. ``pieces``: its floor, by what it is called; those of
    ``alternative`` are of mathematics that computes less, where there is one."""

    unit: str  # "step", "episode" or "token"
    tokens: int
    pieces: dict[str, list[Work]]
    alternative: dict[str, list[Work]] | None = None
    kinds: tuple[str, ...] = ("step",)
    per: int = 1  # how many units the difference of the two kinds is


def model_folder(shape: str, config: dict | None = None) -> Path:
    """A folder with ``model/`` and ``reward/`` of random weights."""
    folder = sft_case.CACHE / f"profile-{shape}"
    if not (folder / "reward" / "model.safetensors").exists():
        preference_case.write_models(folder, config or SHAPES[shape])
    return folder


def engine_of(folder: Path, what: str = "model") -> Any:
    """The boosted model of ``folder``, plugin ddp, as the benchmarks of preferences make it."""
    from benchmarks.preference_ways import boosted
    from coati.models import RewardModel, load_causal_lm, load_scalar_model
    from coati.parallel.launch import launch

    launch()
    if what == "model":
        return boosted(load_causal_lm(str(folder / "model"), dtype="fp32"))
    model = load_scalar_model(RewardModel, str(folder / "reward"), dtype="fp32")
    return boosted(model)


def sft_batch(rows: list[list[int]], supervised: list[int]) -> dict:
    """A right-padded batch; of each row the last ``supervised`` tokens are in the loss."""
    from benchmarks.preference_ways import padded

    batch = padded(rows)
    labels = batch["input_ids"].new_full(batch["input_ids"].shape, -100)
    for index, (row, count) in enumerate(zip(rows, supervised, strict=True)):
        labels[index, len(row) - count : len(row)] = batch["input_ids"][
            index, len(row) - count : len(row)
        ]
    return batch | {"labels": labels}


def real_rows() -> tuple[list[list[int]], list[int]]:
    """The eight conversations, in the file's order, whose step has the median number of tokens."""
    lines = (sft_case.prepare() / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    size = sft_case.BATCH_SIZE
    steps = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    steps.sort(key=lambda step: sum(len(row["input_ids"]) for row in step))
    chosen = steps[len(steps) // 2]
    ids = [row["input_ids"] for row in chosen]
    return ids, [sum(label != -100 for label in row["labels"]) for row in chosen]


def train(engine: Any, trainer: Any, batch: dict, recorder: Recorder) -> None:
    for _ in range(recorder.steps):
        recorder.begin()
        step = engine.train_step([batch], trainer.objective)
        recorder.end(loss=step.loss)


def sft(shape: str, recorder: Recorder, model: dict | None = None, rows: Any = None) -> Done:
    """``rows``: token ids and the number of supervised ones of each; by default real ones."""
    from coati.trainer import SFTTrainer

    model = model or SHAPES[shape]
    engine = engine_of(model_folder(shape, model))
    ids, supervised = rows or real_rows()
    train(engine, SFTTrainer(engine=engine), sft_batch(ids, supervised), recorder)
    lengths = [len(row) for row in ids]
    return Done("step", sum(lengths), {"step": [work_floors.sft(model, lengths, sum(supervised))]})


def preference(
    algorithm: str, shape: str, recorder: Recorder, model: dict | None = None, pairs: Any = None
) -> Done:
    """DPO or a reward model: the steps of preference_ways.py, always on the same pairs, whose
    prompts are twice as long as their answers."""
    from benchmarks import preference_ways

    model = model or SHAPES[shape]
    if pairs is None:
        pairs = preference_case.read(preference_case.made(model["vocab_size"]), PAIRS)
    folder = model_folder(shape, model)
    taken = preference_ways.WAYS[algorithm](folder, pairs * recorder.steps, len(pairs))
    for _ in range(recorder.steps):
        next(taken)
        recorder.begin()
        _, loss = next(taken)
        recorder.end(loss=loss)
    apart, once = (work_floors.pairs(model, pairs, algorithm, shared) for shared in (False, True))
    tokens = preference_case.counted(pairs)["tokens"]
    return Done("step", tokens, {"step": [apart]}, {"step": [once]})


def letters(vocabulary: int) -> type:
    """In the place of a tokenizer: texts whose rewards differ, and an end that is seldom drawn."""

    class Letters:
        pad_token_id = 1
        eos_token_id = vocabulary - 1
        padding_side = "left"

        @staticmethod
        def decode(ids: list[int], skip_special_tokens: bool = False, **_: bool) -> str:
            return "".join("a" if token % 3 else "1" for token in ids)

    return Letters


def online(
    algorithm: str, shape: str, recorder: Recorder, model: dict | None = None, size: Any = None
) -> Done:
    """Episodes of PPO or GRPO, as online_ways.py runs them, on random prompts of one length."""
    from benchmarks import online_ways
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions

    launch()
    model = model or SHAPES[shape]
    size = size or online_case.SIZES[algorithm]
    generator = random.Random(0)
    length = min(online_case.LONGEST_PROMPT, 128) if size.new > 8 else 8
    asked = [
        [generator.randrange(3, model["vocab_size"]) for _ in range(length)]
        for _ in range(size.prompts)
    ]
    tokenizer = letters(model["vocab_size"])
    # The end of a step is told by the trainer before it asks for the prompts of the next.
    rows = online_ways.Paced(
        online_ways.loader(asked, tokenizer), recorder.begin, lambda found: recorder.end(**found)
    )
    options = ParallelOptions(plugin="ddp", precision="fp32", grad_clip=online_case.MAX_NORM)
    models = online_ways.stored(algorithm, model_folder(shape, model), options)
    trainer = online_ways.make_trainer(models, size, recorder.steps, rows, tokenizer)
    trainer.run(rows)
    pieces = work_floors.episode(algorithm, size, [length] * size.prompts, model)
    return Done("episode", size.answers * size.new, pieces)


def sampler(engine: Any, rows: list[list[int]], new: int) -> Callable[[int], Any]:
    """Samples ``new`` tokens for each of ``rows``, of one length, as an episode's rollout does."""
    import torch

    from coati.experience_maker.rollouts.rollout_engine import ModelRollout
    from coati.models.generation.loop import Sampling
    from coati.models.generation.row_noise import NoiseRows

    rollout = ModelRollout(
        engine, sampling=Sampling(), stop_sequences=[], max_new_tokens=new, pad_token_id=2
    )
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)

    def ask(step: int) -> Any:
        noise = NoiseRows(0, step, range(len(rows)))
        return rollout.ask(ids, mask, noise=noise, temperature=1.0).result()

    return ask


def decode(
    count: int,
    shape: str,
    recorder: Recorder,
    model: dict | None = None,
    lengths: dict[str, int] | None = None,
) -> Done:
    """Sampling for ``count`` rows: batches of one and of many new tokens in turn; a token's time
    is what the second takes more, by their difference in tokens."""
    model = model or SHAPES[shape]
    lengths = lengths or DECODING
    generator = random.Random(0)
    rows = [
        [generator.randrange(3, model["vocab_size"]) for _ in range(lengths["prompt"])]
        for _ in range(count)
    ]
    engine = engine_of(model_folder(shape, model))
    for step in range(recorder.steps):
        for kind in ("short", "long"):
            ask = sampler(engine, rows, lengths[kind])
            recorder.begin(kind)
            ask(step)
            recorder.end()
    per = lengths["long"] - lengths["short"]
    context = lengths["prompt"] + (lengths["short"] + lengths["long"]) / 2
    floor = work_floors.token(model, count, context)
    return Done("token", count, {"token": [floor]}, kinds=("long", "short"), per=per)


def cases() -> dict[str, Callable[..., Done]]:
    """Name -> the case, called with a shape and a recorder."""

    def bound(function: Callable[..., Done], first: Any) -> Callable[..., Done]:
        return lambda *given, **keywords: function(first, *given, **keywords)

    found: dict[str, Callable[..., Done]] = {"sft": sft}
    found |= {name: bound(preference, name) for name in ("dpo", "rm")}
    found |= {name: bound(online, name) for name in ("ppo", "grpo")}
    found |= {f"decode_{count}": bound(decode, count) for count in DECODE_ROWS}
    return found
