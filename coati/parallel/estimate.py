"""What training needs in memory per process, in words: the estimate of coati.parallel.footprint,
or, for a model without a formula, what can be counted before activations."""

from coati.parallel.engine import Engine
from coati.parallel.footprint.training_memory import Estimate
from coati.parallel.optimizer_table import DEFAULT as ADAMW
from coati.parallel.optimizer_table import OPTIMIZERS
from coati.parallel.plugins import PLUGINS
from coati.utils.memory import in_units


def describe_estimate(estimate: Estimate) -> str:
    """One line: the peak, its parts from the largest down, and the moment of a step it is at."""
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {in_units(size)}" for name, size in parts if size >= 2**18)
    host = f"; {in_units(estimate.host)} in host memory besides" if estimate.host else ""
    return (
        f"memory per process, estimated: {in_units(estimate.peak)} = {named} (at its peak, "
        f"{estimate.moment}){host}"
    )


def estimate_memory(engine: Engine, optim: str = ADAMW) -> str:
    """One line: bytes of weights, gradients and optimizer states per process, from counts and the
    plugin's sharding.

    Weights 2 (bf16, fp16) or 4 bytes a parameter; gradients the same for what is trained; AdamW 8
    bytes, other optimizers what their rows say of weights, and 4 more for fp32 masters. ``zero2``
    shards the last two over the data-parallel processes, gemini all three; activations come on top.
    """
    options = engine.options
    shares = engine.mesh.dp_size
    row = PLUGINS[options.plugin]
    if engine.mesh.sharded_forward:
        # Gemini leaves this process its share only.
        total = trained = sum(p.numel() for p in engine.module.parameters()) / max(options.tp, 1)
    else:
        total = sum(p.numel() for p in engine.module.parameters())
        trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    half = options.precision != "fp32" and not row.fp32_weights
    weights = total * (2 if half else 4)
    gradients = trained * (2 if half else 4)
    no_masters = row.fp32_weights or (row.hybrid and options.precision == "fp32")
    states = OPTIMIZERS[optim].state_bytes(trained) + (0 if no_masters else 4 * trained)
    states /= shares if row.shards_optimizer or options.zero_stage > 0 else 1
    gradients /= shares if row.shards_gradients or options.zero_stage > 1 else 1
    weights /= shares if engine.mesh.sharded_forward else 1
    device = "GPU" if engine.device.type == "cuda" else "CPU"
    where = "host" if row.host_optimizer or options.zero_cpu_offload else device
    held = f"{int(total):,} parameters held, {int(trained):,} trained"
    return (
        f"memory per process before activations: weights {in_units(weights)} + gradients "
        f"{in_units(gradients)} on the {device}, optimizer {in_units(states)} on the {where} "
        f"({held})"
    )
