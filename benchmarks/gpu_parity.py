"""Items of bench_gpu.py: ColossalAI's kernels, and every plugin in half precision against plain
PyTorch in fp32."""

from statistics import median
from typing import Any

from benchmarks import gpu_models as models
from benchmarks.gpu_item import Report, timed

ROWS = 8
LENGTH = 512
STEPS = 3
LR = 1e-3
CLIP = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
PRECISIONS = ("bf16", "fp16")
# Largest relative differences of losses and gradient norms, and of the fall of the loss over the
# steps, which is what the updates do.
TOLERANCE = {"loss": 2e-2, "norm": 5e-2, "fall": 0.1}


def kernels(report: Report, tiny: bool) -> None:
    """Compile ColossalAI's Adam for this GPU; the items after it find it compiled."""
    import torch

    if not torch.cuda.is_available():
        raise models.NotHere("ColossalAI's Adam is compiled for a GPU, and there is none")
    from coati.parallel.boost import prepare_colossalai
    from coati.parallel.optimizer import can_compile

    if not can_compile():
        raise models.NotHere("nvcc, ninja or g++ is missing: PyTorch's AdamW is used instead")
    prepare_colossalai()
    from colossalai.nn.optimizer import HybridAdam

    parameter = torch.nn.Parameter(torch.zeros(8, device="cuda"))
    seconds, _ = timed(lambda: HybridAdam([parameter]))
    report.add(seconds=seconds)


def plain(batch: dict[str, Any], tiny: bool) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of plain PyTorch in fp32: full logits, its own AdamW."""
    import torch
    import torch.nn.functional as F

    device = models.device()
    model = models.model_of(_shape(tiny), "float32").train()
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    ids = batch["input_ids"].to(device)
    losses = []
    norms = []
    for _ in range(STEPS):
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms


def parity(report: Report, tiny: bool, plugin: str) -> None:
    """Steps of ``plugin`` in each precision beside those of plain PyTorch."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions
    from coati.trainer.sft import SFTObjective

    launch()
    shape = _shape(tiny)
    rows, length = (4, models.TINY_LENGTH) if tiny else (ROWS, LENGTH)
    batch = models.sft_batch(rows, length, shape["vocab_size"])
    wanted = plain(batch, tiny)
    report.add(plain={"losses": wanted[0], "norms": wanted[1]})
    found: dict[str, dict] = {}
    objective = SFTObjective()
    for precision in PRECISIONS:
        options = ParallelOptions(plugin=plugin, precision=precision, grad_clip=CLIP)
        engine = boost(
            models.model_of(shape, "float32"),
            options,
            total_steps=10**9,
            warmup_steps=0,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=BETAS[1],
        )
        taken = [
            timed(lambda engine=engine: engine.train_step([dict(batch)], objective))
            for _ in range(STEPS)
        ]
        losses = [step.loss for _, step in taken]
        norms = [step.grad_norm for _, step in taken]
        found[precision] = compared((losses, norms), wanted)
        found[precision] |= {"losses": losses, "norms": norms}
        found[precision]["step_seconds"] = median(seconds for seconds, _ in taken)
        report.add(**found)
    report.add(
        ok=all(one["ok"] for one in found.values()),
        difference=max(max(one["differences"].values()) for one in found.values()),
    )


def compared(
    ours: tuple[list[float], list[float | None]], plain: tuple[list[float], list[float]]
) -> dict[str, Any]:
    """Whether losses, norms and the fall of the loss agree, with the largest difference of each."""
    losses, norms = ours
    differences = {
        "loss": max(abs(a - b) / b for a, b in zip(losses, plain[0], strict=True)),
        "norm": max(
            abs((a if a is not None else 0.0) - b) / b for a, b in zip(norms, plain[1], strict=True)
        ),
        "fall": abs((losses[0] - losses[-1]) / (plain[0][0] - plain[0][-1]) - 1),
    }
    ok = all(differences[name] <= limit for name, limit in TOLERANCE.items())
    return {"ok": ok, "differences": differences}


def _shape(tiny: bool) -> models.Shape:
    return models.tiny(models.PARITY) if tiny else models.PARITY
