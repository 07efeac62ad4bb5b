"""Items of bench_gpu.py: steps of SFT, DPO and an RL trainer on models of the sizes that others
have published figures of."""

from collections.abc import Callable
from typing import Any

from benchmarks import gpu_models as models
from benchmarks.gpu_item import Report, measure

LR = 1e-5
RANK = 16


def engine_of(model: Any, plugin: str = "zero2", **settings: Any) -> Any:
    from coati.parallel.boost import boost
    from coati.parallel.plugins import ParallelOptions

    options = ParallelOptions(plugin=plugin, precision="bf16", **settings)
    return boost(model, options, total_steps=10**9, warmup_steps=0, lr=LR)


def adapted(shape: models.Shape, quantize: str | None = None) -> Any:
    """A model with LoRA adapters of rank 16 on every linear layer."""
    from coati.models.lora.lora import LoraConfig, apply_lora

    model = models.model_of(shape)
    config = LoraConfig(r=RANK, linear_lora_dropout=0.0, quantize_base=quantize)
    return apply_lora(model, config)


def _start() -> None:
    from coati.parallel.launch import launch

    launch()


def _sized(shape: models.Shape, tiny: bool, length: int) -> tuple[models.Shape, int]:
    return (models.tiny(shape), models.TINY_LENGTH) if tiny else (shape, length)


def sft(
    report: Report,
    tiny: bool,
    shape: models.Shape,
    rows: int,
    length: int,
    lora: bool = True,
    quantize: str | None = None,
    keeps_gib: float = 0,
) -> None:
    """SFT on rows of ``length`` tokens, all of them supervised; with gradient checkpointing where
    the GPU has less memory than ``keeps_gib``."""
    from coati.trainer.sft import SFTObjective

    if quantize == "nf4":
        _need("bitsandbytes")
    _start()
    shape, length = _sized(shape, tiny, length)
    grad_checkpoint = models.memory_gib() < keeps_gib
    report.add(grad_checkpoint=grad_checkpoint)
    model = adapted(shape, quantize) if lora else models.model_of(shape)
    engine = engine_of(model, lora=lora, quantize_base=quantize, grad_checkpoint=grad_checkpoint)
    batch = models.sft_batch(rows, length, shape["vocab_size"])
    report.watch_memory()
    work = models.flops(shape, [length] * rows, rows * (length - 1), RANK if lora else None)
    objective = SFTObjective()
    measure(report, lambda: engine.train_step([dict(batch)], objective), work)


def dpo(
    report: Report,
    tiny: bool,
    shape: models.Shape,
    pairs: int,
    length: int,
    plugin: str = "zero2",
    lora: bool = False,
) -> None:
    """DPO with a live reference: a frozen copy, or with ``lora`` the policy without adapters.
    Gradient checkpointing, as the published figures have it."""
    from coati.models.loading import disable_dropout
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.parallel.plugins import ParallelOptions
    from coati.trainer import DPOTrainer

    _start()
    shape, length = _sized(shape, tiny, length)
    engine: Any = None
    if lora:
        engine = engine_of(adapted(shape), plugin, lora=True, grad_checkpoint=True)
        reference = InferenceModel(engine, adapters_off=True)
    else:
        copy = models.model_of(shape)
        disable_dropout(copy)
        options = ParallelOptions(plugin=plugin, precision="bf16")
        reference = InferenceModel(boost_for_inference(copy, options))
        engine = engine_of(models.model_of(shape), plugin, grad_checkpoint=True)
    trainer = DPOTrainer(engine=engine, reference=reference, starts_at_reference=True)
    batch = models.preference_batch(pairs, length, shape["vocab_size"])
    report.watch_memory()
    supervised = 2 * pairs * (length // 2)
    rank = RANK if lora else None
    work = models.flops(shape, [length] * 2 * pairs, supervised, rank, extra=1)
    measure(report, lambda: engine.train_step([dict(batch)], trainer.objective), work)


def rl_step(report: Report, tiny: bool, shape: models.Shape, length: int) -> None:
    """The update of an RL trainer: the clipped surrogate over one response of ``length`` tokens
    with its prompt, LoRA, gradient checkpointing."""
    from coati.trainer.policy_objective import PolicyObjective, PolicySettings

    _start()
    shape, length = _sized(shape, tiny, length)
    engine = engine_of(adapted(shape), lora=True, grad_checkpoint=True)
    objective = PolicyObjective(PolicySettings(), engine.sum_tensor_over_dp)
    experience = experience_of(shape, length)
    new = experience.action_mask.shape[1]
    report.watch_memory()
    work = models.flops(shape, [length], new, RANK)
    step: Callable[[], Any] = lambda: engine.train_step(  # noqa: E731
        objective.batches([experience]), objective
    )
    measure(report, step, work)


def experience_of(shape: models.Shape, length: int) -> Any:
    """One response; its prompt is a sixteenth of ``length``. The log-probs are those of a model
    that finds all tokens alike, which one of new weights nearly does."""
    import math

    import torch

    from coati.experience_maker.experience import Experience

    sequences = models.tokens(1, length, shape["vocab_size"])
    new = length - length // 16
    generator = torch.Generator().manual_seed(1)
    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences, dtype=torch.bool),
        action_mask=torch.ones(1, new, dtype=torch.bool),
        action_log_probs=torch.full((1, new), -math.log(shape["vocab_size"])),
        reward=torch.ones(1),
        sample_index=torch.zeros(1, dtype=torch.long),
        advantages=torch.randn(1, new, generator=generator),
    )


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise models.NotHere(f"{package} is not installed in this environment")
