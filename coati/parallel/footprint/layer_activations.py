"""Bytes that one transformer layer keeps for its backward pass: a sum over the tensors that
autograd saves, by their causes.

The method is that of Korthikanti et al. (arXiv 2205.05198, section 4), whose layer of width h keeps
s b h (34 + 5 a s / h) bytes: what each operator needs for its gradient, times the width of the
tensor, times its bytes. Their sum is of GPT-3's layer in 16 bits, trained whole. Here it is that of
Llama's family (RMS norms, rotary embeddings, grouped queries, gated MLPs, experts), in fp32, in 16
bits or under autocast, trained whole or by LoRA, with fused attention or with its scores.

Why a formula, and not the layer itself run on tensors without data: experts are chosen by the data,
so a layer of them cannot be run that way; the installed transformers need not know the model; a
formula answers at once and says what a byte is for. That it is the layer is what
tests/parallel/footprint/test_layer_activations.py shows: it compares the sum with the tensors that
transformers' own layers save, family by family.
"""

from dataclasses import dataclass

from coati.parallel.footprint.model_shape import ModelShape

FP32 = 4
STATISTICS = 4  # bytes of one number per row: a norm's reciprocal root, attention's log-sum-exp
INDEX = 8


@dataclass(frozen=True)
class LayerRun:
    """How a layer runs.

    Attributes:
        weight, compute: bytes of a weight, and of what linear layers compute in; under autocast
            weight is 4 and compute 2, and the residual stream has the weights' precision.
        trained: the layer's own weights are trained, else at most adapters of ``lora_rank``.
        targets: names of the linear layers with adapters; None: all of them.
        dropout: adapters drop inputs out.
        quantized: the frozen weights are stored in few bits, and dequantized when they are used.
        dora: adapters train magnitudes apart.
        attention: "sdpa", "eager" or "flash".
        padding_free: attention runs row by row, and its outputs are joined.
        repeats_keys: keys and values are repeated for the queries that share them.
        on_gpu: dropout there keeps a mask of one byte, else the factors themselves.
        fused: norms and SwiGLU are the library's functions (models/fused_layers.py).
    """

    weight: int = FP32
    compute: int = FP32
    trained: bool = True
    lora_rank: int = 0
    targets: frozenset[str] | None = None
    dropout: bool = False
    quantized: bool = False
    dora: bool = False
    attention: str = "sdpa"
    padding_free: bool = False
    repeats_keys: bool = False
    on_gpu: bool = False
    fused: bool = False

    @property
    def autocast(self) -> bool:
        """Weights are rounded when they are used."""
        return self.compute < self.weight

    def adapted(self, name: str) -> bool:
        """Whether the linear layer ``name`` has an adapter."""
        return self.lora_rank > 0 and (self.targets is None or name in self.targets)


def saved_bytes(shape: ModelShape, run: LayerRun, keys: float) -> dict[str, float]:
    """Bytes per token that a layer keeps, by part: "norms", "attention", "mlp".

    ``keys``: keys that a query is scored against (the length S of its row), which count where
    attention keeps its scores.
    """
    norms = shape.layout.norms * _norm(shape, run, shape.hidden, run.weight)
    readers = ("qkv_proj",) if shape.layout.fused else ("q_proj", "k_proj", "v_proj")
    norms += _inputs(run, shape.hidden, readers)
    mlp = _experts(shape, run) if shape.experts else _mlp(shape, run)
    parts = {"norms": norms, "attention": _attention(shape, run, keys), "mlp": mlp}
    return parts | ({"magnitudes": _magnitudes(shape, run)} if run.dora else {})


def _magnitudes(shape: ModelShape, run: LayerRun) -> float:
    """Of DoRA, by token: the outputs of the weight and of the adapter, which the gradient of the
    magnitudes reads."""
    layers = shape.linear_layers().items()
    return 2.0 * run.compute * sum(out for name, (_, out) in layers if run.adapted(name))


def rounded_weights(shape: ModelShape, run: LayerRun) -> int:
    """Bytes of a layer's weights in the lower precision of autocast, kept for the gradients of what
    they were multiplied with."""
    if not run.autocast:
        return 0
    # Dequantized weights are of that precision already, and not kept.
    dense = 0 if run.quantized else shape.linear_weights() - shape.expert_weights()
    adapters = shape.adapter_parameters(run.lora_rank, run.targets) // shape.layers
    return run.compute * (dense + adapters)


def working_bytes(shape: ModelShape, run: LayerRun, keys: float) -> float:
    """Bytes per token of gradients beside what is kept, where the backward pass of a layer holds
    most: in the MLP those of its product and of both factors, less the product itself; in
    attention with scores those of the scores before and after softmax, whose kept probabilities
    and MLP are gone or counted."""
    rows = max(shape.experts_per_token, 1)
    mlp = 2 * run.compute * shape.inner * rows + 3 * run.weight * shape.hidden
    if run.attention != "eager":
        return mlp
    scores = (2 * FP32 + run.compute) * shape.heads * keys
    return max(mlp, scores - saved_bytes(shape, run, keys)["mlp"])


def _norm(shape: ModelShape, run: LayerRun, width: int, given: int) -> float:
    """An RMS norm of ``width`` over inputs of ``given`` bytes: inputs in fp32, the reciprocal root,
    and what is multiplied with a scale that is trained; a fused one keeps that alone."""
    if run.fused:
        return FP32 * width + STATISTICS
    scaled = FP32 if shape.layout.fp32_scale else given
    return FP32 * width + STATISTICS + (scaled * width if run.trained else 0)


def _inputs(run: LayerRun, width: int, readers: tuple[str, ...]) -> float:
    """Inputs of ``width`` that the linear layers ``readers`` share: kept once for those whose own
    weights or adapters get a gradient. Autocast rounds them for each, dropout draws for each."""
    trained = len(readers) if run.trained else sum(map(run.adapted, readers))
    ranks = sum(map(run.adapted, readers)) * run.lora_rank * run.compute
    if not trained:
        return 0
    if run.dropout and not run.trained:
        mask = 1 if run.on_gpu else run.weight
        return trained * (run.compute + mask) * width + ranks
    return (trained if run.autocast else 1) * run.compute * width + ranks


def _attention(shape: ModelShape, run: LayerRun, keys: float) -> float:
    """Queries, keys, values and outputs; of fused attention the log-sum-exp of a row of scores,
    else the probabilities."""
    c = run.compute
    repeated = run.attention == "eager" or run.repeats_keys
    pair = 2 * shape.query if repeated else 2 * shape.key
    if shape.layout.fused and not repeated:  # values are a part of the layer's whole output
        pair += shape.query + shape.key
    kept = float(c * (shape.query + pair))
    kept += _output(shape, run)
    if run.attention == "eager":
        kept += shape.heads * _scores(shape, run, keys)
    else:
        kept += c * shape.query + STATISTICS * shape.heads
    if shape.layout.qk_norm:
        kept += _norm(shape, run, shape.query, c) - STATISTICS + shape.heads * STATISTICS
        kept += _norm(shape, run, shape.key, c) - STATISTICS + shape.kv_heads * STATISTICS
    return kept


def _scores(shape: ModelShape, run: LayerRun, keys: float) -> float:
    """Of one query's scores in one head: probabilities in fp32, and rounded where values are. A
    sink adds a column, cut off again by a copy, and the place of the largest; a cap its result."""
    c = run.compute
    if shape.layout.sinks:
        return (FP32 if run.autocast else c) * (keys + 1) + c * keys + INDEX
    capped = c * keys if shape.caps_scores else 0
    return FP32 * keys + (c * keys if c < FP32 else 0) + capped


def _output(shape: ModelShape, run: LayerRun) -> float:
    """Attention's outputs as the output projection reads them: a copy where rows were joined or
    heads put side by side, the outputs themselves otherwise."""
    read = _inputs(run, shape.query, ("o_proj",))
    own_copy = run.padding_free or run.attention == "eager" or run.dropout
    return read if own_copy else read - (run.compute * shape.query if read else 0)


def _mlp(shape: ModelShape, run: LayerRun) -> float:
    """Of a gated MLP: its inputs, what the activation reads, its result, the other factor, and the
    product. Fused, the activation's result is made again."""
    names = ("gate_up_proj",) if shape.layout.fused else ("gate_proj", "up_proj")
    read = _inputs(run, shape.hidden, names)
    kept = 2 if run.fused and shape.silu and not shape.layout.fused else 3
    return read + kept * run.compute * shape.inner + _inputs(run, shape.inner, ("down_proj",))


def _experts(shape: ModelShape, run: LayerRun) -> float:
    """Each token goes through several experts: inputs, both factors, the activation, the product,
    and the output, which is weighted; in the precision of the weights, which autocast leaves to
    them. The router reads the input once; its scores and their softmax are in fp32."""
    h = shape.hidden
    inner = shape.inner
    factors = 6 * inner if shape.layout.experts == "clamped" else 3 * inner + h
    widths = factors + (h + inner) * run.trained
    router = 2 * FP32 * shape.experts + run.compute * h * run.trained
    return run.weight * shape.experts_per_token * widths + router
