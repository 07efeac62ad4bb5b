"""What the ranks of test_preference_matrix.py do: every preference trainer on tiny models; and
plain PyTorch.

The plain version shares no code with the library: separate forwards of chosen and rejected, full
logits, the formulas written out.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tests.parallel.engine_cases import CLIP, FAMILIES, LR, _join, rate

STEPS, ROWS, VOCAB = 3, 8, 384
BETA, LAM, CENTER, SFT = 0.5, 0.5, 0.1, 0.2


@dataclass(frozen=True)
class Case:
    """``algorithm``: rm, dpo, simpo, ipo, orpo or kto; ``options`` of the plugin; ``reference``:
    frozen, lora or stored; ``family`` of engine_cases.FAMILIES."""

    name: str
    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    reference: str = "frozen"
    side: str = "right"
    ref_tp: int | None = None
    family: str = "llama"


class Rows(list):
    """Rows as the loaders see a data set."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def pairs() -> Rows:
    """Pairs of unequal prompts, every other one long enough to be shared, and answers; every second
    answer is longer than its rival."""
    generator, rows = torch.Generator().manual_seed(9), Rows()

    def some(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, VOCAB, (count,), generator=generator).tolist()

    for _ in range(STEPS * ROWS):
        prompt = some(18, 25) if len(rows) % 2 else some(2, 9)
        row = {"margin": float(torch.rand((), generator=generator))}
        for side in ("chosen", "rejected"):
            answer = some(2, 10)
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_loss_mask"] = [False] * len(prompt) + [True] * len(answer)
        rows.append(
            row | {"seq_length": max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"]))}
        )
    return rows


def judged() -> Rows:
    """The same answers one by one, judged."""
    rows = Rows()
    for index, row in enumerate(pairs()):
        side = "chosen" if index % 3 else "rejected"
        start = row[f"{side}_loss_mask"].index(True)
        ids = row[f"{side}_input_ids"]
        rows.append(
            {
                "prompt": ids[:start],
                "completion": ids[start:],
                "label": side == "chosen",
                "seq_length": len(ids),
            }
        )
    return rows


def base_model(case: Case):
    """The model of a case; of a reward model the head is drawn after it."""
    torch.manual_seed(0)
    model = FAMILIES[case.family](False, VOCAB)
    if case.algorithm != "rm":
        return model
    from coati.models.reward_model import RewardModel

    torch.manual_seed(1)
    return RewardModel(backbone=model)


def with_adapters(model):
    from coati.models.lora.lora import LoraConfig, apply_lora

    return apply_lora(model, LoraConfig(r=4, linear_lora_dropout=0.0))


# Plain PyTorch


def plain_logps(model, ids: list[int], start: int) -> torch.Tensor:
    """Log-probs of ``ids[start:]``."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return F.log_softmax(logits, -1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]


def plain_window(case: Case, model, reference, rows: list[dict]) -> torch.Tensor:
    """The mean loss of a window's rows."""
    if case.algorithm == "kto":
        return plain_kto(model, reference, rows)
    losses = []
    for row in rows:
        sides = [
            (row[f"{s}_input_ids"], row[f"{s}_loss_mask"].index(True))
            for s in ("chosen", "rejected")
        ]
        if case.algorithm == "rm":
            good, bad = (model(torch.tensor([ids]))[0] for ids, _ in sides)
            losses.append(F.softplus(-(good - bad - row["margin"])) + CENTER * (good + bad) ** 2)
            continue
        good, bad = (plain_logps(model, *side) for side in sides)
        if case.algorithm == "orpo":
            odds = [lp.mean() - torch.log(1 - lp.mean().exp()) for lp in (good, bad)]
            losses.append(-good.mean() - LAM * torch.log(torch.sigmoid(odds[0] - odds[1])))
            continue
        if case.algorithm == "simpo":
            losses.append(-torch.log(torch.sigmoid(BETA * (good.mean() - bad.mean()) - 0.3)))
            continue
        with torch.no_grad():
            ref_good, ref_bad = (plain_logps(reference, *side) for side in sides)
        if case.algorithm == "ipo":
            d = good.mean() - bad.mean() - ref_good.mean() + ref_bad.mean()
            losses.append((d - 1 / (2 * BETA)) ** 2)
        else:
            d = good.sum() - bad.sum() - ref_good.sum() + ref_bad.sum()
            losses.append(-torch.log(torch.sigmoid(BETA * d)) - SFT * good.mean())
    return torch.stack(losses).mean()


def plain_kto(model, reference, rows: list[dict]) -> torch.Tensor:
    def gained(prompt, answer):
        with torch.no_grad():
            before = plain_logps(reference, prompt + answer, len(prompt)).sum()
        return plain_logps(model, prompt + answer, len(prompt)).sum() - before

    with torch.no_grad():
        mixed = [
            gained(a["prompt"], b["completion"])
            for a, b in zip(rows, rows[1:] + rows[:1], strict=True)
        ]
        z = max(float(torch.stack(mixed).mean()), 0.0)
    losses = []
    for row in rows:
        toward = BETA * (gained(row["prompt"], row["completion"]) - z)
        losses.append(
            1.2 * (1 - torch.sigmoid(toward)) if row["label"] else 1 - torch.sigmoid(-toward)
        )
    return torch.stack(losses).mean()


def plain_run(case: Case) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one process in fp32."""
    model, reference = base_model(case), base_model(case)
    model = with_adapters(model) if case.options.get("lora") else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    rows, losses, norms = judged() if case.algorithm == "kto" else pairs(), [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step)
        loss = plain_window(case, model, reference, list(rows)[step * ROWS : (step + 1) * ROWS])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms


# The library


class Pad:
    pad_token_id, eos_token_id = 2, 2

    def __init__(self, side: str) -> None:
        self.padding_side = side


def reference_of(case: Case, engine):
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.parallel.plugins import ParallelOptions

    if case.reference == "lora":
        return InferenceModel(engine, adapters_off=True)
    options = dict(case.options) | ({"tp": case.ref_tp} if case.ref_tp else {})
    options.pop("lora", None)
    return InferenceModel(boost_for_inference(base_model(case), ParallelOptions(**options)))


def make_trainer(case: Case):
    """The case's trainer, its training loader and its evaluation loader."""
    from coati.dataset.load.collator import (
        DataCollatorForKTODataset,
        DataCollatorForPreferenceDataset,
    )
    from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
    from coati.parallel.boost import boost
    from coati.parallel.plugins import ParallelOptions
    from coati.trainer import DPOTrainer, KTOTrainer, ORPOTrainer, RewardModelTrainer

    model = base_model(case)
    options = {"grad_clip": CLIP, "accumulation_steps": case.accumulation} | case.options
    model = with_adapters(model) if options.get("lora") else model
    engine = boost(model, ParallelOptions(**options), lr=LR, total_steps=10, warmup_steps=0)
    mesh = {"dp_rank": engine.mesh.dp_rank, "dp_size": engine.mesh.dp_size}
    kto = case.algorithm == "kto"
    rows = judged() if kto else pairs()
    collate = (DataCollatorForKTODataset if kto else DataCollatorForPreferenceDataset)(
        Pad(case.side), 64, pad_to_multiple_of=engine.options.sequence_multiple
    )
    batch = ROWS // (case.accumulation * engine.mesh.dp_size)
    train = GlobalBatchLoader(
        rows,
        collate,
        batch_size=batch,
        accumulation_steps=case.accumulation,
        shuffle=False,
        group_by_length=False,
        partners=kto,
        **mesh,
    )
    evaluation = EvaluationLoader(Rows(list(rows)[:7]), collate, batch_size=4, partners=kto, **mesh)
    if case.algorithm == "rm":
        trainer = RewardModelTrainer(engine=engine, center_coef=CENTER)
    elif case.algorithm == "orpo":
        trainer = ORPOTrainer(engine=engine, lam=LAM)
    elif kto:
        trainer = KTOTrainer(
            engine=engine, reference=reference_of(case, engine), beta=BETA, desirable_weight=1.2
        )
    elif case.algorithm == "simpo":
        trainer = DPOTrainer(engine=engine, loss_type="simpo_loss", beta=BETA, gamma=0.3)
    else:
        kind, sft = ("ipo_loss", 0.0) if case.algorithm == "ipo" else ("dpo_loss", SFT)
        trainer = DPOTrainer(
            engine=engine,
            reference=reference_of(case, engine),
            loss_type=kind,
            beta=BETA,
            sft_coef=sft,
        )
    return trainer, train, evaluation


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Per case: (loss, gradient norm) of each step, and the evaluation after them."""
    _join()
    reports = []
    for case in cases:
        trainer, train, evaluation = make_trainer(case)
        engine = trainer.engine
        steps = [engine.train_step(window, trainer.objective) for window in train.global_batches(0)]
        trainer.before_evaluation(evaluation)
        after = engine.evaluate(evaluation, trainer.objective)
        reports.append(
            {
                "steps": [(step.loss, step.grad_norm) for step in steps],
                "units": [step.num_terms for step in steps],
                "after": (after.loss, after.num_terms),
                "samples": {
                    name: int(sum(map(len, values))) for name, values in after.metrics.items()
                },
            }
        )
    return reports
