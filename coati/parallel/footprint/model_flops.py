"""Floating-point operations that a model's passes need by mathematics, whatever computes them: what
model FLOPs utilization (MFU) is made of (PaLM, arXiv 2204.02311, appendix B).

A weight of a matrix product costs 2 a token forward and 4 backward, of which 2 are for the weight's
own gradient: frozen weights, below LoRA adapters, cost 4 in all instead of 6. Layers' weights count
at every real token, of experts those that a token is sent to; the vocabulary's at the tokens whose
log-probs are asked for. Attention costs 4 x width of the queries for each pair of a token and one
that it sees (itself among them), forward, and twice that backward. Padding counts for nothing, nor
does what is computed twice (gradient checkpointing), nor norms, activations, softmax and optimizer;
tokens that rows share count once where they go through the model once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coati.parallel.footprint import value_heads
from coati.parallel.footprint.model_shape import ModelShape

FORWARD = 2.0
BACKWARD = 4.0
INPUTS_ALONE = 2.0  # backward through a weight that is frozen


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of a pass for each real ``token``, each ``target`` whose log-prob is asked for, and
    each ``pair`` of a token and one before it or itself, in the same row; ``windowed``: for each
    such pair within the model's sliding window."""

    token: float
    target: float
    pair: float
    windowed: float = 0.0

    def of(self, tokens: Any, targets: Any, pairs: Any, windowed: Any = 0.0) -> Any:
        """The pass's FLOPs; numbers or tensors."""
        found = self.token * tokens + self.target * targets + self.pair * pairs
        return found + self.windowed * windowed if self.windowed else found


@dataclass(frozen=True)
class Windows:
    """Sliding windows of attention: the ``layers`` that look back ``length`` tokens at most."""

    layers: int = 0
    length: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Windows":
        """Of a ``config.json``; of a multimodal model, of its language model."""
        config = config.get("text_config") or config
        length = config.get("sliding_window")
        if not length or config.get("use_sliding_window") is False:
            return cls()
        layers = config["num_hidden_layers"]
        if kinds := config.get("layer_types"):
            return cls(kinds.count("sliding_attention"), length)
        if every := config.get("sliding_window_pattern"):  # Gemma 3: all but each so-manieth
            return cls(layers - layers // every, length)
        if config.get("model_type") == "gemma2":  # the even ones
            return cls(layers - layers // 2, length)
        return cls(layers, length)


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters of ``rank`` on the linear layers named ``targets`` (None: on every one)."""

    rank: int
    targets: frozenset[str] | None = None


def active_weights(shape: ModelShape) -> int:
    """Weights of one layer's matrix products that a token meets, the router's and those of the
    experts it is sent to among them."""
    dense = sum(rows * columns for rows, columns in shape.linear_layers().values())
    expert = 3 * shape.hidden * shape.inner
    return dense + shape.experts * shape.hidden + shape.experts_per_token * expert


def forward_flops(
    shape: ModelShape, scalar: bool = False, windows: Windows | None = None
) -> PassFlops:
    """Of a pass without gradient. ``scalar``: without the vocabulary head."""
    windows = windows or Windows()
    target = 0.0 if scalar else FORWARD * shape.embedding_parameters()
    attention = 2 * FORWARD * shape.query
    return PassFlops(
        FORWARD * shape.layers * active_weights(shape),
        target,
        attention * (shape.layers - windows.layers),
        attention * windows.layers,
    )


def training_flops(
    shape: ModelShape,
    scalar: bool = False,
    windows: Windows | None = None,
    adapters: Adapters | None = None,
    with_values: bool = False,
) -> PassFlops:
    """Of a forward and a backward pass. ``adapters``: they alone are trained. ``with_values``:
    ILQL's heads are trained beside the vocabulary's."""
    forward = forward_flops(shape, scalar, windows)
    backward = BACKWARD if adapters is None else INPUTS_ALONE
    weights = (FORWARD + backward) / FORWARD
    token = weights * forward.token
    if adapters is not None:
        # Their weights' own gradient, too.
        trained = shape.adapter_parameters(adapters.rank, adapters.targets)
        token += (FORWARD + BACKWARD) * trained
    target = weights * forward.target
    if with_values:
        target += (FORWARD + BACKWARD) * value_heads.parameters(shape)
        target += FORWARD * value_heads.target_parameters(shape)
    both = (FORWARD + BACKWARD) / FORWARD
    return PassFlops(token, target, both * forward.pair, both * forward.windowed)
