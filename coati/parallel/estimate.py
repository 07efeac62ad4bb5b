"""What training needs in memory before activations, per process."""

from coati.parallel.engine import Engine
from coati.parallel.plugins import PLUGINS
from coati.utils.memory import in_units


def estimate_memory(engine: Engine) -> str:
    """One line: bytes of weights, gradients and optimizer states per process, from counts and the
    plugin's sharding.

    Weights 2 (bf16, fp16) or 4 bytes a parameter; gradients the same for what is trained; AdamW 8
    bytes, and 4 more for fp32 masters. ``zero2`` shards the last two over the data-parallel
    processes, gemini all three; activations come on top.
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
    states = trained * (12 if half else 8)
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
