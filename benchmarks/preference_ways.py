"""One training step of DPO and of a reward model in several ways; each worker process of the
benchmarks runs one.

    python benchmarks/preference_ways.py WAY FOLDER STEPS PAIRS

FOLDER is what preference_case.made or .real wrote, PAIRS how many are in a step. A step is taken
for each line on standard input, and printed as a line of JSON. The ways:

  dpo          this library: one forward of interleaved rows, log-probs at supervised positions, a
  live reference dpo_stored   the same, with log-probs of the reference that were stored before
  dpo_plain    plain PyTorch: chosen and rejected forward by themselves, log-softmax of full logits
  rm           this library: one forward of interleaved rows, no vocabulary head rm_plain     plain
  PyTorch: a value head on a language model, chosen and rejected by themselves, logits left unused
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import preference_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402

Steps = Iterator[tuple[float, float]]  # seconds and loss of each step


class Rows(list):
    """Pairs as the library's loader sees a data set."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def prepared(pairs: list[dict]) -> Rows:
    rows = Rows()
    for pair in pairs:
        row = {}
        for side in case.SIDES:
            row[f"{side}_input_ids"] = pair["prompt_ids"] + pair[f"{side}_ids"]
            row[f"{side}_loss_mask"] = [False] * len(pair["prompt_ids"]) + [True] * len(
                pair[f"{side}_ids"]
            )
        rows.append(row | {"seq_length": max(len(row[f"{side}_input_ids"]) for side in case.SIDES)})
    return rows


class Pad:
    pad_token_id = 2
    eos_token_id = 2
    padding_side = "right"


def library(trainer, pairs: list[dict], batch: int, stored=None) -> Steps:
    """Steps through the library's own loader and engine; ``stored`` gives a window its reference's
    log-probs."""
    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.dataset.load.loader import GlobalBatchLoader

    collate = DataCollatorForPreferenceDataset(Pad, 4096)
    loader = GlobalBatchLoader(prepared(pairs), collate, batch_size=batch, shuffle=False)
    for window in loader.global_batches(0):
        window = window if stored is None else [stored(batch) for batch in window]
        yield
        started = time.perf_counter()
        step = trainer.engine.train_step(window, trainer.objective)
        yield time.perf_counter() - started, step.loss


def boosted(model: nn.Module):
    from coati.parallel.boost import boost

    # A schedule so long that its learning rate stays where it starts.
    keywords = {
        "lr": case.LEARNING_RATE,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "total_steps": 10**9,
    }
    return boost(model, options(), **keywords)


def options():
    from coati.parallel.plugins import ParallelOptions

    return ParallelOptions(plugin="ddp", precision="fp32", grad_clip=case.MAX_NORM)


def dpo(folder: Path, pairs: list[dict], batch: int, stored: bool = False) -> Steps:
    from coati.models import load_causal_lm
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.parallel.launch import launch
    from coati.trainer import DPOTrainer

    launch()
    engine = boosted(load_causal_lm(str(folder / "model"), dtype="fp32"))
    reference = None
    if not stored:
        reference = InferenceModel(
            boost_for_inference(load_causal_lm(str(folder / "model"), dtype="fp32"), options())
        )
    trainer = DPOTrainer(engine=engine, reference=reference, beta=case.BETA)

    def with_stored(batch):
        # Numbers as any file would hold them: what they are changes no time.
        values = torch.full((len(batch["chosen_input_ids"]),), -1000.0)
        return batch | {"chosen_reference": values, "reject_reference": values}

    return library(trainer, pairs, batch, with_stored if stored else None)


def rm(folder: Path, pairs: list[dict], batch: int) -> Steps:
    from coati.models import RewardModel, load_scalar_model
    from coati.parallel.launch import launch
    from coati.trainer import RewardModelTrainer

    launch()
    model = load_scalar_model(RewardModel, str(folder / "reward"), dtype="fp32")
    model.score.bias.requires_grad_(False)
    return library(RewardModelTrainer(engine=boosted(model)), pairs, batch)


# Plain PyTorch


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    }


def full_logps(model: nn.Module, pairs: list[dict], side: str) -> Tensor:
    """Sums over the answers' tokens, (B,), by log-softmax of full logits."""
    batch = padded([pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs])
    logps = model(**batch).logits[:, :-1].log_softmax(-1)
    tokens = logps.gather(2, batch["input_ids"][:, 1:, None])[:, :, 0]
    places = torch.arange(1, batch["input_ids"].shape[1])
    starts = torch.tensor([len(pair["prompt_ids"]) for pair in pairs])[:, None]
    return (tokens * ((places >= starts) & batch["attention_mask"][:, 1:].bool())).sum(1)


def plain(
    model: nn.Module, loss: Callable[[list[dict]], Tensor], pairs: list[dict], batch: int
) -> Steps:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case.LEARNING_RATE, betas=case.BETAS, weight_decay=0.0, fused=True
    )
    for start in range(0, len(pairs), batch):
        yield
        started = time.perf_counter()
        value = loss(pairs[start : start + batch])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), case.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - started, float(value)


def dpo_plain(folder: Path, pairs: list[dict], batch: int) -> Steps:
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    reference.requires_grad_(False)

    def loss(rows: list[dict]) -> Tensor:
        good, bad = (full_logps(policy, rows, side) for side in case.SIDES)
        with torch.no_grad():
            ref_good, ref_bad = (full_logps(reference, rows, side) for side in case.SIDES)
        return -F.logsigmoid(case.BETA * (good - bad - ref_good + ref_bad)).mean()

    return plain(policy, loss, pairs, batch)


class WithValue(nn.Module):
    """A language model with a value head beside its vocabulary head, as reward models are often
    made."""

    def __init__(self, folder: Path):
        super().__init__()
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / "model")
        self.score = nn.Linear(self.model.config.hidden_size, 1)
        with torch.no_grad():
            self.score.weight.copy_(
                load_file(folder / "reward" / "model.safetensors")["score.weight"]
            )
            self.score.bias.zero_()
        self.score.bias.requires_grad_(False)

    def forward(self, **batch: Tensor) -> Tensor:
        outputs = self.model(**batch, output_hidden_states=True)
        last = batch["attention_mask"].sum(1) - 1
        return self.score(outputs.hidden_states[-1][torch.arange(len(last)), last])[:, 0]


def rm_plain(folder: Path, pairs: list[dict], batch: int) -> Steps:
    model = WithValue(folder)

    def loss(rows: list[dict]) -> Tensor:
        sides = ([row["prompt_ids"] + row[f"{side}_ids"] for row in rows] for side in case.SIDES)
        good, bad = (model(**padded(ids)) for ids in sides)
        return -F.logsigmoid(good - bad).mean()

    return plain(model, loss, pairs, batch)


WAYS: dict[str, Callable[[Path, list[dict], int], Steps]] = {
    "dpo": dpo,
    "dpo_stored": lambda *given: dpo(*given, stored=True),
    "dpo_plain": dpo_plain,
    "rm": rm,
    "rm_plain": rm_plain,
}


def main() -> None:
    way = sys.argv[1]
    folder = Path(sys.argv[2])
    steps = int(sys.argv[3])
    batch = int(sys.argv[4])
    pairs = case.read(folder, steps * batch)
    taken = WAYS[way](folder, pairs, batch)
    for index in range(steps):
        next(taken)  # up to the step, without what it needs for its rows
        if index == 0:
            print("ready", flush=True)
        sft_case.wait_for_turn()
        seconds, loss = next(taken)
        mine = case.counted(pairs[index * batch : (index + 1) * batch])
        print(json.dumps({"seconds": seconds, "loss": loss, **mine}), flush=True)
    from coati.utils.memory import peak_memory_mb

    print(json.dumps({"peak_mb": peak_memory_mb()}), flush=True)


if __name__ == "__main__":
    main()
