"""Which settings of a method fit into the memory of a GPU: every plugin, all weights or LoRA, with
and without gradient checkpointing, each with the largest batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from coati.parallel.footprint.model_shape import ModelShape, built_in, load_shape
from coati.parallel.footprint.training_memory import Estimate, estimate
from coati.parallel.footprint.training_plan import TrainingPlan
from coati.parallel.optimizer_table import DEFAULT as ADAMW
from coati.parallel.optimizer_table import OPTIMIZERS, optimizer_problem
from coati.parallel.options import ParallelOptions
from coati.parallel.plugin_checks import problems
from coati.parallel.plugins import HYBRID, PLUGINS, ZERO_3

# What CUDA's context, its libraries' kernels and workspaces and unused parts of the allocator's
# blocks take beside tensors; an allowance, which no formula gives.
RESERVED = 0.75 * 2**30
BATCHES = (1, 2, 4, 8, 16, 32, 64)
METHODS: dict[str, str] = {
    "pretrain": "continued pre-training, whose rows are packs",
    "sft": "supervised fine-tuning",
    "lora": "supervised fine-tuning of LoRA adapters alone",
    "rm": "a reward model",
    "dpo": "DPO with its reference",
    "orpo": "ORPO, without a reference",
    "kto": "KTO with its reference",
    "gkd": "distillation from a teacher, half of the responses the student's own",
    "ilql": "ILQL: policy, heads of values and their targets",
    "ppo": "PPO: policy, critic, reference and a reward model of the same size",
    "grpo": "GRPO: policy and reference, reward functions",
    "online_dpo": "online DPO: policy and reference, reward functions or a judge",
}
WITH_REFERENCE = ("dpo", "kto", "ppo", "grpo", "online_dpo")
WITH_ROLLOUTS = ("ppo", "grpo", "online_dpo")
WHOLE_WEIGHTS = ("ilql",)  # on every process


@dataclass(frozen=True)
class Fit:
    """Settings that fit, and their estimate."""

    plan: TrainingPlan
    estimate: Estimate

    @property
    def peak(self) -> float:
        """Bytes of the GPU, the reserve included."""
        return self.estimate.peak + RESERVED


def settings_that_fit(
    shape: ModelShape,
    method: str,
    memory: float,
    gpus: int = 1,
    length: int = 2048,
    rank: int = 16,
    **asked: Any,
) -> list[Fit]:
    """Best first: nothing in host memory before something, all weights before LoRA, whole layers
    before split ones, without recomputation before with it; and each with the largest batch of
    :data:`BATCHES`. ``memory``: bytes of one GPU; ``asked``: as of :func:`candidates`."""
    found: list[Fit] = []
    for plan in candidates(method, gpus, length, rank, **asked):
        if not _divides(shape, plan.options.tp):
            continue
        if any(_alike(plan, fit.plan) for fit in found):
            continue
        if fit := largest_batch(shape, plan, memory):
            found.append(fit)
    return sorted(found, key=_rank)


def largest_batch(shape: ModelShape, plan: TrainingPlan, memory: float) -> Fit | None:
    """``plan`` with the largest batch whose estimate fits; None where not even one row does."""
    best = None
    for size in BATCHES[:-1] if plan.method in WITH_ROLLOUTS else BATCHES:
        fit = at_batch(shape, plan, size)
        if fit.peak > memory:
            break
        best = fit
    return best


def at_batch(shape: ModelShape, plan: TrainingPlan, size: int) -> Fit:
    """``plan`` with micro-batches of ``size``; rollouts sample four times as many, at most 64, a
    student half of them."""
    rollouts = min(4 * size, 64) if plan.method in WITH_ROLLOUTS else 0
    if plan.method == "gkd":
        rollouts = -(-size // 2)
    rows = 2 * size if plan.method == "online_dpo" else size
    plan = replace(plan, batch_size=size, forward_rows=rows, rollout_rows=rollouts)
    return Fit(plan, estimate(shape, plan))


def candidates(
    method: str,
    gpus: int,
    length: int,
    rank: int,
    *,
    base: str | None = None,
    optim: str = ADAMW,
    offload_activations: bool = False,
    tokens_per_batch: int | None = None,
    teacher: ModelShape | None = None,
) -> Iterator[TrainingPlan]:
    """Every combination that the plugins allow; those with something in host memory last.
    ``base``: how that of adapters is stored; ``offload_activations``: wherever layers are computed
    again; ``tokens_per_batch``: of micro-batches; ``teacher``: of distillation."""
    trained = (rank,) if method == "lora" else (0, rank)
    for offload in (False, True):
        for lora_rank in trained:
            for grad_checkpoint in (False, True):
                for options in _splits(gpus, offload, method in WITH_ROLLOUTS, optim):
                    options = replace(
                        options,
                        grad_checkpoint=grad_checkpoint,
                        offload_activations=offload_activations and grad_checkpoint,
                        lora=bool(lora_rank),
                        quantize_base=base if lora_rank else None,
                        tokens_per_batch=tokens_per_batch,
                    )
                    plan = _plan(method, options, gpus, length, lora_rank, offload)
                    plan = replace(plan, optim=optim, teacher=teacher)
                    if method in WHOLE_WEIGHTS and not plan.plugin.whole_weights:
                        continue
                    cannot = problems(options) or optimizer_problem(optim, options)
                    if not cannot and _offloads(plan) == offload:
                        yield plan


def _plan(
    method: str, options: ParallelOptions, gpus: int, length: int, rank: int, offload: bool
) -> TrainingPlan:
    sft = method in ("pretrain", "sft", "lora")
    frozen = method in WITH_REFERENCE and not rank or method == "ppo"
    return TrainingPlan(
        method="sft" if sft else method,
        options=options,
        processes=gpus,
        length=length,
        supervised=0.5 if method in WITH_ROLLOUTS else 1.0,
        lora_rank=rank,
        quantize_base=options.quantize_base,
        lora_dropout=sft and bool(rank),
        reference=method in WITH_REFERENCE and not rank,
        reward_model=method == "ppo",
        offload_inference=offload and frozen and not PLUGINS[options.plugin].places_weights,
        on_gpu=True,
    )


def _splits(gpus: int, offload: bool, rollouts: bool, optim: str = ADAMW) -> list[ParallelOptions]:
    # What looks at whole matrices has them where nothing is sharded.
    plugin = HYBRID if OPTIMIZERS[optim].whole else "zero2"
    bf16 = ParallelOptions(plugin=plugin, precision="bf16")
    if offload:
        offloaded = [replace(bf16, plugin="zero2_cpu")]
        return [bf16, *offloaded] if rollouts else offloaded
    splits = [bf16]
    if gpus > 1:
        splits += [replace(bf16, plugin=ZERO_3), replace(bf16, plugin=HYBRID, tp=gpus)]
    return splits


def _divides(shape: ModelShape, tp: int) -> bool:
    return shape.heads % tp == 0 and shape.kv_heads % tp == 0


def _offloads(plan: TrainingPlan) -> bool:
    """Something is in host memory."""
    return plan.plugin.host_optimizer or plan.offload_inference


def _alike(plan: TrainingPlan, other: TrainingPlan) -> bool:
    """The other trains the same weights, and needs no host memory more."""
    fewer = plan.plugin.host_optimizer + plan.offload_inference
    return (
        bool(plan.lora_rank) == bool(other.lora_rank)
        and other.plugin.host_optimizer + other.offload_inference < fewer
    )


def _rank(fit: Fit) -> tuple:
    plan = fit.plan
    return (
        _offloads(plan),
        bool(plan.lora_rank),
        plan.options.tp > 1 or plan.plugin.sharded_forward,
        plan.options.grad_checkpoint,
        -plan.batch_size,
    )


def flags_of(fit: Fit) -> list[str]:
    """The flags that ask for it, beside model and data."""
    plan = fit.plan
    options = plan.options
    flags = ["--plugin", options.plugin, "--mixed_precision", str(options.precision)]
    flags += ["--tp", str(options.tp)] * (options.tp > 1)
    flags += ["--lora_rank", str(plan.lora_rank)] * bool(plan.lora_rank)
    flags += ["--quantize_base", str(plan.quantize_base)] * bool(plan.quantize_base)
    flags += ["--optim", plan.optim] * (plan.optim != ADAMW)
    flags += ["--grad_checkpoint"] * options.grad_checkpoint
    flags += ["--offload_activations"] * options.offload_activations
    flags += ["--offload_inference_models"] * plan.offload_inference
    budget = options.tokens_per_batch
    flags += ["--tokens_per_batch", str(budget)] * (budget is not None)
    size = str(plan.batch_size)
    if plan.method not in WITH_ROLLOUTS:
        flags += ["--batch_size", size, "--max_length", str(plan.length)]
    else:
        # An optimizer step of 32 responses (pairs) divides what an episode collects by default.
        flags += ["--train_batch_size", size, "--accumulation_steps", str(32 // plan.batch_size)]
        flags += ["--inference_batch_size", str(plan.rollout_rows)]
        flags += ["--max_length", str(plan.length), "--max_seq_len", str(plan.length // 2)]
    return flags + (["--nproc", str(plan.processes)] if plan.processes > 1 else [])


# What the table of models shows: a title, the method, and whether adapters alone are trained
COLUMNS = (
    ("SFT", "sft", False),
    ("SFT, LoRA", "lora", True),
    ("reward model", "rm", False),
    ("DPO", "dpo", False),
    ("DPO, LoRA", "dpo", True),
    ("GRPO", "grpo", False),
    ("GRPO, LoRA", "grpo", True),
    ("PPO", "ppo", False),
    ("PPO, LoRA", "ppo", True),
)


def memory_table(length: int = 2048, rank: int = 16) -> list[list[str]]:
    """Header and rows: GiB on one GPU of each built-in model for each of :data:`COLUMNS`, bf16,
    plugin zero2, gradient checkpointing, one row of ``length`` tokens (one pair of such)."""
    options = ParallelOptions(precision="bf16", grad_checkpoint=True)
    models = {name: load_shape(name) for name in set(built_in().values())}
    rows = []
    for name, shape in sorted(models.items(), key=lambda item: item[1].parameters()):
        row = [name.split("/")[1], f"{shape.parameters() / 1e9:.2g}B"]
        for _, method, adapters in COLUMNS:
            asked = replace(options, lora=adapters)
            plan = _plan(method, asked, 1, length, rank if adapters else 0, False)
            peak = at_batch(shape, plan, 1).peak
            row.append(f"{peak / 2**30:.3g}" if peak < 1000 * 2**30 else f"{peak / 2**30:.0f}")
        rows.append(row)
    return [["model", "weights", *(title for title, _, _ in COLUMNS)], *rows]
