"""Peak memory of a process in training: what is always there, and what a moment of a step adds.

    peak = weights + optimizer states + other models + the most that a moment holds besides

The moments are the end of the forward pass (all that layers keep, arXiv 2205.05198, or with
recomputation their inputs), the backward pass of the last layer and of the first one, between which
gradients appear as fast as activations go, and the optimizer's step. The vocabulary head works in
chunks (models/head.py), so that no moment holds (B, S, V) logits. What a plugin holds is written
down as it is in ColossalAI 0.5.0, not as the algorithm allows: see :func:`gradient_bytes`.
"""

from dataclasses import dataclass, replace

from coati.models.quantization_registry import stored_bytes
from coati.parallel.footprint import value_heads
from coati.parallel.footprint.gemini_chunks import chunks
from coati.parallel.footprint.layer_activations import (
    FP32,
    LayerRun,
    rounded_weights,
    saved_bytes,
    working_bytes,
)
from coati.parallel.footprint.model_shape import ModelShape
from coati.parallel.footprint.training_plan import TrainingPlan
from coati.parallel.optimizer_table import OPTIMIZERS

HEAD_CHUNK = 128 * 2**20  # bytes of fp32 logits, models/logprobs.py: CHUNK_BYTES
ZERO_BUCKET = 12 * 2**20  # elements, low_level_zero_plugin.py: reduce_bucket_size_in_m
PACKED = 2 * 2**30  # bytes, models/generation/prepacked_linear.py: LIMIT_BYTES
CACHE_COLUMNS = 256  # by which models/generation/kv_cache.py grows


@dataclass(frozen=True)
class Estimate:
    """``moments``: for each moment of a step the bytes of each part; ``host``: bytes that are in
    host memory besides, where the device is a GPU."""

    moments: dict[str, dict[str, float]]
    host: float = 0.0

    @property
    def moment(self) -> str:
        """When memory is at its peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each part at the peak."""
        return {name: size for name, size in self.moments[self.moment].items() if size}

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Model:
    """A model that is trained: its part of the shape, and what its plugin makes of it."""

    shape: ModelShape
    plan: TrainingPlan
    scalar: bool = False

    @property
    def run(self) -> LayerRun:
        run = self.plan.layer_run(self.scalar)
        eager = self.shape.eager or self.plan.options.enable_sequence_parallelism
        return replace(run, attention="eager", padding_free=False) if eager else run

    @property
    def total(self) -> int:
        """Parameters, adapters included."""
        shape = self.shape
        held = shape.backbone_parameters() + shape.hidden if self.scalar else shape.parameters()
        return held + self.values + self.adapters

    @property
    def adapters(self) -> int:
        """Parameters of the adapters."""
        plan = self.plan
        magnitudes = 0
        if plan.dora:
            outputs = self.shape.linear_layers().items()
            adapted = (o for n, (_, o) in outputs if self.run.adapted(n))
            magnitudes = self.shape.layers * sum(adapted)
        return self.shape.adapter_parameters(plan.lora_rank, plan.lora_targets) + magnitudes

    @property
    def weight_bytes(self) -> float:
        """All weights as they are stored."""
        whole = float(self.run.weight * self.total)
        kind = self.plan.quantize_base
        if kind is None:
            return whole
        shape = self.shape
        layers = shape.linear_layers().values()
        saved = sum(self.run.weight * i * o - stored_bytes(kind, o, i) for i, o in layers)
        return whole - shape.layers * saved

    @property
    def dequantized(self) -> float:
        """The largest weight that is made whole for a product; of int8 in fp32 on the way, of DoRA
        for its norms."""
        kind = self.plan.quantize_base
        if kind is None:
            return 0.0
        width = self.run.compute
        width += FP32 if self.plan.dora or (kind == "int8" and width < FP32) else 0
        return float(width * max(i * o for i, o in self.shape.linear_layers().values()))

    @property
    def values(self) -> int:
        """Parameters of ILQL's heads."""
        return value_heads.parameters(self.shape) if self.plan.method == "ilql" else 0

    @property
    def trained(self) -> int:
        plan = self.plan
        if not plan.lora_rank:
            return self.total
        return self.adapters + self.values + (self.shape.hidden if self.scalar else 0)

    @property
    def moments(self) -> float:
        """Bytes of the optimizer's states, fp32 master weights not among them."""
        row = OPTIMIZERS[self.plan.optim]
        if self.plan.lora_rank:
            return row.state_bytes(self.trained)
        embedding = self.shape.embedding_parameters()
        head = 0 if self.scalar or self.shape.tied else embedding
        return row.state_bytes(self.trained - embedding - head, embedding, head)

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        if self.plan.method == "ilql":  # the last layer of a Q head
            return value_heads.inner(self.shape) * self.shape.vocabulary
        if self.plan.lora_rank:
            return self.largest_matrix
        return max(self.shape.embedding_parameters(), self.largest_matrix)

    @property
    def largest_matrix(self) -> int:
        """The same between embedding and head."""
        if self.plan.lora_rank:
            layers = self.shape.linear_layers().values()
            return self.plan.lora_rank * max(max(sizes) for sizes in layers)
        experts = self.shape.expert_weights() * 2 // 3
        return max(self.shape.hidden * self.shape.inner, experts)


def estimate(shape: ModelShape, plan: TrainingPlan) -> Estimate:
    """The peak of one process of ``plan`` for the model of ``shape``."""
    part = shape.part_of(plan.options.tp, plan.options.pp)
    trained = _trained_models(part, plan)
    static = _joined(*(static_bytes(model) for model in trained.values()))
    static = _joined(static, _frozen(part, plan))
    first = next(iter(trained.values()))
    moments: dict[str, dict[str, float]] = {}
    for name, model in trained.items():
        label = f"{name}: " if len(trained) > 1 else ""
        for moment, added in step_moments(model).items():
            moments[label + moment] = _joined(static, added)
    if plan.rollout_rows:
        moments["rollout"] = _joined(static, rollout_bytes(first))
    if plan.reference or plan.rollout_rows:
        added = forward_bytes(first)
        moments["forward without gradient"] = _joined(static, added)
    if (teacher := _teacher_part(plan)) is not None:
        whole = replace(plan, lora_rank=0, quantize_base=None, dora=False)
        added = forward_bytes(_Model(teacher, whole)) | {"logits": 0.0}  # its head waits
        moments["teacher's forward"] = _joined(static, added, _teacher_states(plan))
    if not plan.on_gpu:
        moments |= _moments_of_files(first, static)
    host = sum(host_bytes(model) for model in trained.values()) if plan.on_gpu else 0.0
    return Estimate(moments, host)


def _trained_models(part: ModelShape, plan: TrainingPlan) -> dict[str, _Model]:
    if plan.method == "ppo":
        return {"actor": _Model(part, plan), "critic": _Model(part, plan, scalar=True)}
    if plan.method == "rm":
        return {"reward model": _Model(part, plan, scalar=True)}
    return {"actor": _Model(part, plan)}


def _frozen(part: ModelShape, plan: TrainingPlan) -> dict[str, float]:
    """Models that are only run forward, in the precision of the run."""
    width = FP32 if plan.options.precision == "fp32" else 2
    reference = part.parameters() * plan.reference
    reward = (part.backbone_parameters() + part.hidden) * plan.reward_model
    teacher = _teacher_part(plan)
    held = 0 if teacher is None else teacher.parameters()
    shares = plan.shares if plan.plugin.sharded_forward else 1
    sizes = {"reference": width * reference / shares, "reward model": width * reward / shares}
    sizes["teacher"] = float(width * held)  # whole in every process
    if plan.method == "ilql":
        sizes["targets of the heads"] = value_heads.target_bytes(part)
    if plan.offload_inference and plan.on_gpu:  # one of them is there at a time
        return {"frozen model in use": max(sizes.values())}
    return {name: size for name, size in sizes.items() if size}


def _teacher_part(plan: TrainingPlan) -> ModelShape | None:
    """What a process holds of the teacher: all, but for the shares of plugin 3d's ``--tp``."""
    if plan.teacher is None:
        return None
    return plan.teacher.part_of(plan.options.tp if plan.plugin.hybrid else 1)


def _teacher_states(plan: TrainingPlan) -> dict[str, float]:
    """Its last hidden states of all micro-batches of a step, in fp32."""
    if plan.teacher is None:
        return {}
    tokens = plan.step_tokens * plan.supervised
    return {"teacher's states": FP32 * tokens * plan.teacher.hidden}


def _moments_of_files(model: _Model, static: dict[str, float]) -> dict[str, dict[str, float]]:
    """In the memory of a host the weights are there twice while they are loaded (the mapped file
    and copies at aligned addresses, compat/cpu/malloc.py), and when they are saved (weights.py
    copies them all, under LoRA too)."""
    weights = model.weight_bytes
    mapped = weights
    if model.plan.quantize_base:  # of layers that are stored in few bits nothing stays mapped
        shape = model.shape
        mapped = float(model.run.weight * (shape.parameters() - shape.layers * _dense(shape)))
    return {
        "loading": {
            "weights": weights,
            "mapped file": mapped,
            "dequantized": 2 * model.dequantized,
        },
        "saving": _joined(static, {"copies to save": weights}),
    }


def static_bytes(model: _Model) -> dict[str, float]:
    """Weights and optimizer states, which are there all the time: of AdamW two moments in fp32 (8
    bytes), and fp32 master weights (4) wherever the plugin keeps them, fp32 runs of zero2
    included."""
    plan = model.plan
    row = plan.plugin
    shares = plan.shares
    if row.sharded_forward:
        return _chunk_bytes(model)
    stage = plan.options.zero_stage
    no_masters = row.fp32_weights or (row.hybrid and plan.options.precision == "fp32")
    states = model.moments + (0 if no_masters else FP32 * model.trained)
    states /= shares if row.shards_optimizer or stage else 1
    on_host = plan.on_gpu and (row.host_optimizer or plan.options.zero_cpu_offload)
    parts = {"weights": model.weight_bytes, "optimizer": 0.0 if on_host else states}
    if row.upstream == "TorchDDPPlugin" and (shares > 1 or plan.on_gpu):
        parts["gradient buckets"] = model.run.weight * model.trained
    return parts


def _chunk_bytes(model: _Model) -> dict[str, float]:
    """Gemini's weights and master weights lie in chunks, each divided over the processes, empty
    places included; Adam's moments are those of the parameters in this process's part. Of the
    weights two chunks are gathered, that of the operator in use and the one before."""
    plan = model.plan
    packed = chunks(model.shape.parameter_sizes())
    held = sum(chunk.size for chunk in packed) / plan.shares
    used = sum(chunk.used_by_first(plan.shares) for chunk in packed)
    width = model.run.weight
    return {
        "weights": width * held,
        "optimizer": FP32 * held + 8 * used,
        "gathered chunks": float(width * sum(sorted(chunk.size for chunk in packed)[-2:])),
    }


def host_bytes(model: _Model) -> float:
    """Optimizer states that a plugin keeps in host memory, and the inputs of layers of
    ``--offload_activations``."""
    row = model.plan.plugin
    activations = _offloaded_bytes(model)
    if not (row.host_optimizer or model.plan.options.zero_cpu_offload):
        return activations
    return (model.moments + FP32 * model.trained) / model.plan.shares + activations


def _offloaded_bytes(model: _Model) -> float:
    """Inputs of checkpointed layers that are in host memory: all but two, of which one is copied
    while the next layer runs."""
    plan = model.plan
    if not (plan.on_gpu and plan.options.offload_activations):
        return 0.0
    return max(model.shape.layers - 2, 0) * plan.tokens * model.run.weight * model.shape.hidden


def gradient_bytes(model: _Model) -> float:
    """Gradients after a backward pass. LowLevelZero keeps its share as a view of the whole
    gradient, so that they take as much on many processes as on one (low_level_optim.py:344);
    Gemini writes them over the gathered weights, unless gradients are accumulated."""
    plan = model.plan
    if plan.plugin.sharded_forward:
        accumulates = plan.options.accumulates
        return model.run.weight * model.trained / plan.shares * accumulates
    return model.run.weight * model.trained


def step_moments(model: _Model) -> dict[str, dict[str, float]]:
    """What each moment of an optimizer step holds besides :func:`static_bytes`."""
    plan = model.plan
    shape = model.shape
    run = model.run
    tokens = plan.tokens
    keys = float(plan.length)
    layer = tokens * sum(saved_bytes(shape, run, keys).values()) + rounded_weights(shape, run)
    kept = tokens * run.weight * shape.hidden if plan.options.grad_checkpoint else layer
    recomputed = layer if plan.options.grad_checkpoint else 0.0
    working = tokens * working_bytes(shape, run, keys) + model.dequantized
    gradients = gradient_bytes(model)
    earlier = gradients if plan.options.accumulates else 0.0
    all_kept = (shape.layers * kept - _offloaded_bytes(model)) + tokens * 2 * FP32 * shape.hidden
    head = {} if model.scalar else head_bytes(model)
    own = head.pop("head gradient", 0.0)
    return {
        "backward of the head": {"gradients": earlier + own, "activations": all_kept} | head,
        "backward of the last layer": {
            "gradients": earlier + own,
            "activations": all_kept + recomputed,
            "working memory": working,
        },
        "backward of the first layer": {
            "gradients": gradients,
            "activations": max(kept, layer),
            "working memory": max(working, _end_of_backward(model)),
        },
        "optimizer step": {"gradients": gradients, "working memory": _step_bytes(model)},
        "weights gathered": {"gradients": gradients, "working memory": _gather_bytes(model)},
    }


def head_bytes(model: _Model) -> dict[str, float]:
    """The vocabulary head at its gradient: hidden states of supervised tokens and their gradient, a
    chunk of logits, and the gradient of its weight.

    16-bit logits are copied to fp32, and their gradient back. Where logits are changed after the
    head, they are formed whole, with their copies.
    """
    plan = model.plan
    shape = model.shape
    run = model.run
    tokens = plan.tokens * plan.supervised
    states = 2 * run.compute * tokens * shape.hidden
    wide = FP32 if run.compute == FP32 else FP32 + 2 * run.compute
    chunk = HEAD_CHUNK
    if plan.method == "gkd":  # both log-softmaxes and a gradient, or the logits before it
        wide = 3 * FP32
        chunk //= 2
    rows = min(tokens, chunk / (FP32 * shape.vocabulary))
    logits = wide * rows * shape.vocabulary
    if shape.caps_logits:
        logits += 4 * run.compute * plan.tokens * shape.vocabulary
    parts = {"logits": logits, "head states": states} | _teacher_states(plan)
    if plan.method == "ilql":
        one_chunk = rows == tokens
        parts |= value_heads.gradient_parts(
            shape, tokens, logits, one_chunk, run.weight, run.compute
        )
    if run.autocast:
        parts["rounded head"] = run.compute * shape.embedding_parameters()
    gradient = shape.embedding_parameters() * run.trained + model.values
    if gradient:
        parts["head gradient"] = float(run.weight * gradient)
    return parts


def _end_of_backward(model: _Model) -> float:
    """The input embedding's gradient comes last and is as large as its weight; a tied head's is
    there already. LowLevelZero copies it twice on its way between processes."""
    plan = model.plan
    width = model.run.weight
    if plan.plugin.upstream == "LowLevelZeroPlugin":
        bucket = max(min(ZERO_BUCKET, model.trained), model.largest)
        copies = width * bucket * (1 + 1 / plan.shares)
        return copies
    tied = model.shape.tied and model.run.trained and not model.scalar
    return width * model.shape.embedding_parameters() if tied else 0.0


def _step_bytes(model: _Model) -> float:
    """LowLevelZero makes fp32 copies of this process's gradients for its master weights, and one in
    fp64 of the largest for the norm. Gemini's Adam, where its kernel is not compiled, makes four
    fp32 tensors for one parameter at a time; AdamW works in place elsewhere, other optimizers as
    their rows say."""
    plan = model.plan
    if plan.plugin.own_adam and not plan.on_gpu:
        part = max(
            chunk.used_by_first(plan.shares) for chunk in chunks(model.shape.parameter_sizes())
        )
        return 4.0 * FP32 * min(model.largest, part)
    optim = OPTIMIZERS[plan.optim]
    each = optim.step_bytes if plan.on_gpu else optim.cpu_step_bytes
    own = each * (model.largest_matrix if optim.whole else model.largest)
    if plan.plugin.upstream != "LowLevelZeroPlugin":
        return own
    on_host = plan.on_gpu and plan.plugin.host_optimizer
    copies = 0.0 if model.run.weight == FP32 or on_host else FP32 * model.trained / plan.shares
    return copies + max(2 * FP32 * model.largest, own) / plan.shares


def _gather_bytes(model: _Model) -> float:
    """After its step LowLevelZero gathers the weights in buckets: this process's part, all parts,
    and those put in order."""
    plan = model.plan
    if plan.plugin.upstream != "LowLevelZeroPlugin":
        return 0.0
    bucket = min(ZERO_BUCKET * plan.shares, model.trained)
    return model.run.weight * bucket * (2 + 1 / plan.shares)


def forward_bytes(model: _Model) -> dict[str, float]:
    """A forward pass without gradient: the residual stream and the widest tensors of one layer, and
    a chunk of logits."""
    plan = model.plan
    shape = model.shape
    run = model.run
    tokens = plan.rows_without_gradient * plan.length
    widest = 3 * run.compute * shape.inner * max(shape.experts_per_token, 1)
    scores = 3 * FP32 * shape.heads * plan.length if run.attention == "eager" else 0
    chunk = FP32 if run.compute == FP32 else FP32 + 2 * run.compute
    logits = chunk * min(tokens, HEAD_CHUNK / (FP32 * shape.vocabulary)) * shape.vocabulary
    return {
        "working memory": tokens * (3 * run.weight * shape.hidden + max(widest, scores))
        + model.dequantized,
        "logits": logits,
        "rounded weights": shape.layers * rounded_weights(shape, run),
    }


def rollout_bytes(model: _Model) -> dict[str, float]:
    """Keys and values of all layers for every response, with the room they grow by; the logits of a
    token in fp32 and their copies for sampling; weights as autocast rounds them, and as a CPU packs
    them for few rows (models/generation/prepacked_linear.py)."""
    plan = model.plan
    shape = model.shape
    run = model.run
    columns = plan.length + CACHE_COLUMNS
    cache = 2 * run.compute * shape.key * shape.layers * plan.rollout_rows * columns
    packs = not (plan.on_gpu or plan.lora_rank or run.compute < FP32) and plan.rollout_rows > 0
    return {
        "key-value cache": cache,
        "packed weights": float(FP32 * packs * _plain_weights(shape)),
        "logits": 4 * FP32 * plan.rollout_rows * shape.vocabulary,
        "rounded weights": shape.layers * rounded_weights(shape, run),
    }


def _dense(shape: ModelShape) -> int:
    """Weights of the linear layers of one layer, experts and router left out."""
    return sum(rows * columns for rows, columns in shape.linear_layers().values())


def _plain_weights(shape: ModelShape) -> int:
    """Weights of the linear layers that MKL packs: none of a model beyond 2 GiB of them."""
    dense = shape.linear_weights() - shape.expert_weights()
    total = shape.layers * dense + shape.embedding_parameters()
    return total if FP32 * total <= PACKED else 0


def _joined(*parts: dict[str, float]) -> dict[str, float]:
    """Sums by name."""
    joined: dict[str, float] = {}
    for each in parts:
        for name, size in each.items():
            joined[name] = joined.get(name, 0.0) + size
    return joined
