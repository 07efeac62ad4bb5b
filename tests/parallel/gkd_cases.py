"""What the ranks of test_gkd_matrix.py do: distillation on tiny models; and plain PyTorch, with
full logits and the formula written out."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.parallel.engine_cases import CLIP, LR, _join, rate
from tests.parallel.preference_cases import ROWS, STEPS, VOCAB, Pad, Rows, pairs, with_adapters
from tests.tiny import tiny_llama

BETA, SFT, NEW_TOKENS, MAX_LENGTH = 0.3, 0.2, 5, 64
SHARE = 0.5


@dataclass(frozen=True)
class Case:
    """``options`` of the plugin; ``share`` of rows that the student answers, greedily."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    share: float = 0.0
    accumulation: int = 1


def rows() -> Rows:
    """Prompts and responses as rows of coati prepare."""
    found = Rows()
    for pair in pairs():
        ids = pair["chosen_input_ids"]
        learned = pair["chosen_loss_mask"]
        labels = [id if mask else -100 for id, mask in zip(ids, learned, strict=True)]
        found.append({"input_ids": ids, "labels": labels, "seq_length": len(ids)})
    return found


def student():
    return tiny_llama(0, vocab_size=VOCAB)


def teacher():
    """Of other sizes, and surer of itself than random weights are."""
    model = tiny_llama(7, layers=1, hidden=32, vocab_size=VOCAB)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def chosen(index: int, share: float) -> bool:
    from coati.trainer.on_policy_rows import OnPolicyRows, OnPolicySettings

    return OnPolicyRows(None, OnPolicySettings(share, [[2]], 2, NEW_TOKENS, 64)).chosen(0, index)


# Plain PyTorch


@torch.no_grad()
def greedy(model, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


def plain_row(model, wise, ids: list[int], start: int, own: bool) -> torch.Tensor:
    """(n,) losses of the tokens from ``start`` on."""
    at = torch.arange(start - 1, len(ids) - 1)
    q = model(input_ids=torch.tensor([ids])).logits[0, at].softmax(-1)
    with torch.no_grad():
        p = wise(input_ids=torch.tensor([ids])).logits[0, at].softmax(-1)
    m = BETA * p + (1 - BETA) * q
    losses = BETA * (p * (p / m).log()).sum(-1) + (1 - BETA) * (q * (q / m).log()).sum(-1)
    nll = -q[torch.arange(len(at)), ids[start:]].log()
    return losses if own else losses + SFT * nll


def plain_run(share: float, lora: bool) -> tuple[list[float], list[float], list[int]]:
    """Losses, gradient norms and supervised tokens of one process in fp32."""
    model = student()
    model = with_adapters(model) if lora else model
    wise = teacher().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms, tokens = [], [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step)
        parts = []
        for index in range(step * ROWS, (step + 1) * ROWS):
            row = list(rows())[index]
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            ids, own = row["input_ids"], chosen(index, share)
            if own:
                ids = ids[:start] + greedy(model, ids[:start])
            parts.append(plain_row(model, wise, ids, start, own))
        loss = torch.cat(parts).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        tokens.append(sum(map(len, parts)))
    return losses, norms, tokens


# The library


def make_trainer(case: Case):
    from coati.dataset.load.collator import DataCollatorForSupervisedDataset
    from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
    from coati.parallel.boost import boost
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.parallel.plugins import ParallelOptions
    from coati.recipes.teacher_model import teacher_options
    from coati.trainer import GKDTrainer
    from coati.trainer.on_policy_rows import OnPolicySettings
    from coati.trainer.teachers import ModelTeacher

    options = {"grad_clip": CLIP, "accumulation_steps": case.accumulation} | case.options
    model = with_adapters(student()) if options.get("lora") else student()
    wise = boost_for_inference(teacher(), teacher_options(ParallelOptions(**options)))
    engine = boost(model, ParallelOptions(**options), lr=LR, total_steps=10, warmup_steps=0)
    mesh = {"dp_rank": engine.mesh.dp_rank, "dp_size": engine.mesh.dp_size}
    collate = DataCollatorForSupervisedDataset(Pad("right"), MAX_LENGTH)
    train = GlobalBatchLoader(
        rows(),
        collate,
        batch_size=ROWS // (case.accumulation * engine.mesh.dp_size),
        accumulation_steps=case.accumulation,
        shuffle=False,
        group_by_length=False,
        **mesh,
    )
    evaluation = EvaluationLoader(Rows(list(rows())[:7]), collate, batch_size=4, **mesh)
    settings = OnPolicySettings(case.share, [[2]], 2, NEW_TOKENS, MAX_LENGTH, temperature=0)
    trainer = GKDTrainer(
        engine=engine,
        teacher=ModelTeacher(InferenceModel(wise)),
        beta=BETA,
        sft_coef=SFT,
        on_policy=settings if case.share else None,
    )
    return trainer, train, evaluation


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Per case: loss, gradient norm and tokens of each step, and the evaluation after them."""
    _join()
    reports = []
    for case in cases:
        trainer, train, evaluation = make_trainer(case)
        engine = trainer.engine
        steps = []
        for micro_batches in train.global_batches(0):
            batches = trainer.training_batches(micro_batches)
            steps.append(engine.train_step(batches, trainer.objective))
            trainer.state.sample_start_index += train.rows_per_step
        after = engine.evaluate(evaluation, trainer.objective)
        reports.append(
            {
                "steps": [(step.loss, step.grad_norm) for step in steps],
                "tokens": [step.num_terms for step in steps],
                "after": (after.loss, after.num_terms),
                "samples": {
                    name: int(sum(map(len, values))) for name, values in after.metrics.items()
                },
            }
        )
    return reports
