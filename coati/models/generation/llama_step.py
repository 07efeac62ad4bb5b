"""One token of each row through a Llama-like model on a CPU, by fewer and larger operations.

Queries, keys and values are one product, gate and up projection another, the residual is added
inside the product before it, keys and values go straight into the cache. The weights are copies in
oneDNN's layout, so they must not change while a step is in use. What it computes is the model's own
forward up to rounding, and is checked against that before it is used.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.generation.kv_cache import RowCache
from coati.models.generation.model_call import innermost
from coati.models.generation.rotary_table import RotaryTable

# Families whose layers are RMS norms, rotary embeddings and a gated SiLU, nothing else.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
TOLERANCE = 1e-3  # of the largest logit


def decodes_like_llama(model: nn.Module, plain: Sequence[nn.Module]) -> bool:
    """Whether :class:`LlamaStep` serves ``model``, of which ``plain`` are the plain fp32 linear
    layers: none of its layers is sharded, adapted, hooked, or attends to a window."""
    inner = innermost(model)
    config = getattr(inner, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or inner.training:
        return False
    if config.hidden_act != "silu" or config._attn_implementation not in ("sdpa", "eager"):
        return False
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or _windows(config):
        return False
    known = set(plain)
    body = inner.model
    hooked = any(
        each._forward_hooks or each._forward_pre_hooks or "forward" in each.__dict__
        for each in body.modules()
    )
    projections = [
        getattr(part, name)
        for layer in body.layers
        for part, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _FEED_FORWARD))
        for name in names
    ]
    plain_weights = all(
        type(each) is nn.Parameter and each.dtype == torch.float32 and each.device.type == "cpu"
        for each in body.parameters()
    )
    return not hooked and plain_weights and all(each in known for each in projections)


def _windows(config: Any) -> bool:
    used = getattr(config, "use_sliding_window", True)
    return bool(used and getattr(config, "sliding_window", None))


class _Layer:
    """The packed weights of one layer. Those that follow a norm are already multiplied by what the
    norm multiplies by: :func:`_length` is all that is left of it."""

    def __init__(self, layer: Any, pack: Callable[[Tensor], Tensor]) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        norms = layer.input_layernorm, layer.post_attention_layernorm
        joint = attention.q_proj, attention.k_proj, attention.v_proj
        gates = mlp.gate_proj, mlp.up_proj
        self.qkv = pack(_joint_weight(joint, norms[0])), _joint_bias(joint)
        self.out = pack(attention.o_proj.weight), attention.o_proj.bias
        self.gates = pack(_joint_weight(gates, norms[1])), _joint_bias(gates)
        self.down = pack(mlp.down_proj.weight), mlp.down_proj.bias
        self.smallest = tuple(map(_smallest, norms))
        self.scale = attention.scaling
        own = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_norms = None if own[0] is None else tuple(map(_norm, own))


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon


def _smallest(norm: Any) -> Tensor:
    """The square root of d eps, d being the width of ``norm``."""
    return torch.tensor(math.sqrt(len(norm.weight) * norm.variance_epsilon))


def _factor(norm: Any) -> Tensor:
    """What ``norm`` multiplies by, times the square root of d."""
    return norm.weight * math.sqrt(len(norm.weight))


def _joint_weight(layers: Sequence[nn.Linear], norm: Any) -> Tensor:
    weights: list[Tensor] = [layer.weight for layer in layers]
    return torch.cat(weights).mul_(_factor(norm))


def _joint_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return torch.cat(biases) if biases else None


class LlamaStep:
    """See above; :func:`decodes_like_llama` says for which models. ``checked``: whether it has been
    compared with the model's own forward. ``covered``: the linear layers whose work it does."""

    def __init__(self, model: nn.Module, pack: Callable[[Tensor], Tensor]) -> None:
        inner = innermost(model)
        body = inner.model
        config = inner.config
        self.checked = False
        self.embedding = body.embed_tokens
        self.angles = RotaryTable(body.rotary_emb)
        self.norm = _factor(body.norm), _smallest(body.norm)
        self.head = inner.get_output_embeddings()
        self.width = body.layers[0].self_attn.head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.layers = [_Layer(layer, pack) for layer in body.layers]
        self.covered = {each for each in body.layers.modules() if type(each) is nn.Linear}

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, positions: Tensor, blocked: Tensor | None, cache: RowCache
    ) -> Tensor:
        """Logits (rows, V) after ``tokens`` (rows,) at ``positions`` (rows,), which ``cache`` then
        holds. ``blocked`` (rows, shown): what to add to attention scores, or None."""
        hidden = self.embedding(tokens)
        cos, sin = self.angles(positions, hidden)
        if blocked is not None:
            blocked = blocked[:, None, None]
        cache.extend()
        for index, layer in enumerate(self.layers):
            hidden = self._layer(index, layer, hidden, cos, sin, blocked, cache)
        factor, smallest = self.norm
        return self.head((hidden / _length(hidden, smallest)).mul_(factor))

    def _layer(
        self,
        index: int,
        layer: _Layer,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        blocked: Tensor | None,
        cache: RowCache,
    ) -> Tensor:
        rows = len(hidden)
        keyed = self.heads + self.kv_heads
        joint = _product(hidden / _length(hidden, layer.smallest[0]), *layer.qkv)
        joint = joint.view(rows, -1, self.width)
        turned = joint.narrow(1, 0, keyed)
        if layer.head_norms is not None:
            parts = turned.split([self.heads, self.kv_heads], dim=1)
            pairs = zip(parts, layer.head_norms, strict=True)
            turned = torch.cat([F.rms_norm(x, x.shape[-1:], *norm) for x, norm in pairs], dim=1)
        swapped = turned.roll(self.width // 2, -1)
        turned = turned.mul_(cos).addcmul_(swapped, sin)
        fresh = turned.narrow(1, self.heads, self.kv_heads), joint.narrow(1, keyed, self.kv_heads)
        keys, values = cache.write(index, *fresh)
        query = turned.narrow(1, 0, self.heads).reshape(rows, self.kv_heads, -1, self.width)
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=blocked, scale=layer.scale
        )
        hidden = _added(attended.reshape(rows, -1), hidden, *layer.out)
        normed = hidden / _length(hidden, layer.smallest[1])
        gate, up = _product(normed, *layer.gates).chunk(2, dim=-1)
        return _added(F.silu(gate).mul_(up), hidden, *layer.down)

    def agrees(self, mine: Tensor, own: Tensor) -> bool:
        """Whether logits (rows, V) are the model's own up to rounding."""
        error = float((mine - own).abs().amax())
        self.checked = error <= TOLERANCE * max(float(own.abs().amax()), 1e-6)
        return self.checked


def _length(hidden: Tensor, smallest: Tensor) -> Tensor:
    """(rows, 1): what an RMS norm divides ``hidden`` (rows, d) by, times the square root of d."""
    return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).hypot(smallest)


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def _added(rows: Tensor, residual: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``residual`` + the product."""
    return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, packed, bias, "add")
