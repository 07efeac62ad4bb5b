"""What the ranks of test_packing.py do: the same rows trained on in packs and one by one, under one
plugin."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

from coati.trainer.sft import SFTObjective
from tests.models_table.families import BY_TYPE, tiny_model

STEPS, PACKS, LR, CLIP = 3, 4, 5e-3, 0.5
# Of each step: the rows of each pack, by length; all packs of a step are not equally full.
LENGTHS = (
    ((9, 4, 2), (15,), (5, 5, 5), (3, 12)),
    ((7, 13), (20,), (1, 2, 3, 4, 5), (6, 6, 6)),
    ((11, 5), (8, 8), (16,), (2, 2)),
)


def rows_of(step: int) -> list[list[torch.Tensor]]:
    """Token ids of the rows of each pack of ``step``; all but a row's first two tokens are
    supervised."""
    generator = torch.Generator().manual_seed(step)
    return [
        [torch.randint(3, 384, (n,), generator=generator) for n in pack]
        for pack in LENGTHS[step % len(LENGTHS)]
    ]


def weights_of(row: torch.Tensor) -> list[float]:
    """A weight for each token of ``row``, by the token itself."""
    return ((row % 7) / 6).tolist()


def one_by_one(packs: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows padded to the longest, one a row of the batch."""
    rows = [row for pack in packs for row in pack]
    width = max(map(len, rows))
    ids = torch.stack([pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one_by_one_weighted(packs: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = one_by_one(packs)
    return batch | {"loss_weights": (batch["input_ids"] % 7) / 6}


def packed(packs: list[list[torch.Tensor]], weighted: bool = False) -> dict[str, torch.Tensor]:
    """The same rows as PackCollator gives them."""
    from coati.dataset.load.collator import DataCollatorForSupervisedDataset
    from coati.dataset.load.packing import PackCollator
    from tests.tiny import tiny_tokenizer

    rows = [
        [
            {"input_ids": (ids := row.tolist()), "labels": [-100] * len(ids[:2]) + ids[2:]}
            | ({"loss_weights": weights_of(row)} if weighted else {})
            for row in pack
        ]
        for pack in packs
    ]
    return PackCollator(DataCollatorForSupervisedDataset(tiny_tokenizer()))(rows)


def _share(packs: list, engine) -> list:
    mine = len(packs) // engine.mesh.dp_size
    return packs[engine.mesh.dp_rank * mine : (engine.mesh.dp_rank + 1) * mine]


def _windows(packs: list, accumulation: int, collate) -> list[dict[str, torch.Tensor]]:
    size = len(packs) // accumulation
    return [collate(packs[start : start + size]) for start in range(0, len(packs), size)]


def train_all_ways(family: str, options: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """In a worker: loss and gradient norm of each step on the rows one by one, on packs, and on
    packs with the block-diagonal mask even where they could be laid end to end."""
    from coati.parallel.launch import launch

    launch(seed=0, timeout_s=60)
    return {
        "one_by_one": _train(family, options, one_by_one),
        "packed": _train(family, options, packed, packing=True),
        "packed, masked": _train(family, options, packed, masked=True, packing=True),
        "weighted one by one": _train(family, options, one_by_one_weighted),
        "weighted": _train(family, options, partial(packed, weighted=True), packing=True),
    }


def _train(
    family: str, options: dict[str, Any], collate, masked: bool = False, **more
) -> list[tuple[float, float]]:
    from coati.parallel.boost import boost
    from coati.parallel.plugins import ParallelOptions

    model = tiny_model(BY_TYPE[family])
    values = ParallelOptions(grad_clip=CLIP, **options, **more)
    engine = boost(model, values, lr=LR, total_steps=10, warmup_steps=0)
    if masked:
        engine.padding_free = None
    results = []
    for step in range(STEPS):
        mine = _share(rows_of(step), engine)
        done = engine.train_step(
            _windows(mine, min(values.accumulation_steps, len(mine)), collate), SFTObjective()
        )
        results.append((done.loss, done.grad_norm))
    return results


def refusal(family: str, options: dict[str, Any] | None = None) -> str:
    """In a worker: what boosting ``family`` for packs says."""
    from coati.parallel.launch import launch

    launch(seed=0, timeout_s=60)
    try:
        _train(family, options or {"plugin": "zero2"}, packed, packing=True)
    except ValueError as error:
        return str(error)
    return ""
