"""What ILQL's heads (models/ilql_heads.py) add to the memory of a process: two heads onto the
vocabulary and one onto a value, each of two layers of width 2d, and fp32 targets of the first
two."""

from coati.parallel.footprint.layer_activations import FP32
from coati.parallel.footprint.model_shape import ModelShape

WIDER = 2  # models/ilql_heads.py


def inner(shape: ModelShape) -> int:
    """Width of the first layer of a head."""
    return WIDER * shape.hidden


def _q_parameters(shape: ModelShape) -> int:
    width = inner(shape)
    return width * (shape.hidden + 1) + shape.vocabulary * (width + 1)


def parameters(shape: ModelShape) -> int:
    """Of the three heads, which are trained."""
    width = inner(shape)
    return 2 * _q_parameters(shape) + width * (shape.hidden + 1) + width + 1


def target_parameters(shape: ModelShape) -> int:
    """Of the targets, which are not trained."""
    return 2 * _q_parameters(shape)


def target_bytes(shape: ModelShape) -> float:
    """Of the targets, whole on every process."""
    return float(FP32 * target_parameters(shape))


def gradient_parts(
    shape: ModelShape, tokens: float, logits: float, one_chunk: bool, weight: int, compute: int
) -> dict[str, float]:
    """The heads at their gradient, for ``tokens`` actions: where these are one chunk, its
    ``logits`` are kept of three heads; inner states, fp32 ones among them; and of a Q head the
    gradient by its values beside that by its logits."""
    states = tokens * inner(shape) * (2 * 3 * compute + 2 * 3 * FP32)
    return {
        "logits": logits * (3 if one_chunk else 1),
        "states of the value heads": states,
        "second gradient of a Q head": float(weight * shape.vocabulary * inner(shape)),
    }
