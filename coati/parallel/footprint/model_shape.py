"""The numbers of a model's configuration that memory depends on, and the built-in configurations
of well-known models."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from coati.models.directory_files import check_small_files
from coati.utils.json_io import load_json

SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Layout:
    """What sets a model family apart from Llama.

    Attributes:
        norms: of width d in a layer; the two that Gemma puts behind attention and MLP feed no
            linear layer.
        qk_norm: queries and keys are normalized head by head.
        fp32_scale: a norm scales in fp32 and rounds after, as Gemma's do; else before.
        qkv_bias, out_bias: biases of the attention's linear layers.
        fused: one linear layer for queries, keys and values, and one for both factors of the MLP.
        sinks: attention with one learned logit per head, which no fused kernel serves here.
        experts: how the experts' activation is computed: "glu" as the MLP's, or "clamped" with
            gpt-oss's clamped one.
    """

    norms: int = 2
    qk_norm: bool = False
    fp32_scale: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    fused: bool = False
    sinks: bool = False
    experts: str = "glu"


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(),
    "mixtral": Layout(),
    "phi3": Layout(fused=True),
    "smollm3": Layout(),
    "qwen2": Layout(qkv_bias=True),
    "qwen3": Layout(qk_norm=True),
    "qwen3_moe": Layout(qk_norm=True),
    "gemma": Layout(fp32_scale=True),
    "gemma2": Layout(norms=4, fp32_scale=True),
    "gemma3_text": Layout(norms=4, qk_norm=True, fp32_scale=True),
    "gpt_oss": Layout(fp32_scale=True, qkv_bias=True, out_bias=True, sinks=True, experts="clamped"),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    ``inner``: width of the MLP, or of one expert; ``experts`` 0: no mixture. ``caps_scores``:
    attention caps its scores. ``caps_logits``: the vocabulary head's logits are changed after it,
    so that they are formed whole.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool
    layout: Layout
    experts: int = 0
    experts_per_token: int = 0
    caps_scores: bool = False
    caps_logits: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """The shape of a ``config.json``; of a multimodal model, that of its language model.

        Raises ValueError for a family without a formula, and for a field that is missing.
        """
        text = config.get("text_config")
        if isinstance(text, Mapping) and "hidden_size" in text:
            tied = config.get("tie_word_embeddings", True)
            config = {"tie_word_embeddings": tied} | dict(text)
        family = str(config.get("model_type"))
        if family not in LAYOUTS:
            raise ValueError(
                f"there is no formula for model family {family!r}; there is for "
                f"{', '.join(LAYOUTS)}. --dry_run takes a real step of any model and prints its "
                "peak"
            )
        try:
            return cls(**_sizes(config, family))
        except KeyError as error:
            raise ValueError(f"the configuration of a {family} model has no {error}") from error

    @property
    def query(self) -> int:
        """Width of all queries, and of what attention returns."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all keys; values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def eager(self) -> bool:
        """No fused attention serves it: the scores (heads, S, S) of a row are formed and kept."""
        return self.layout.sinks or self.caps_scores

    @property
    def silu(self) -> bool:
        """The MLP's activation is SiLU; Gemma's is GELU."""
        return not self.family.startswith("gemma")

    def part_of(self, tp: int = 1, pp: int = 1) -> "ModelShape":
        """What one of ``tp`` x ``pp`` processes holds: heads, widths and vocabulary divided, and
        the layers of a stage."""
        if tp == pp == 1:
            return self
        return replace(
            self,
            layers=-(-self.layers // pp),
            heads=self.heads // tp,
            kv_heads=max(self.kv_heads // tp, 1),
            inner=-(-self.inner // tp),
            vocabulary=-(-self.vocabulary // tp),
        )

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of one layer outside experts, by name."""
        h = self.hidden
        output = {"o_proj": (self.query, h)}
        down = {"down_proj": (self.inner, h)}
        if self.layout.fused:
            joined = {
                "qkv_proj": (h, self.query + 2 * self.key),
                "gate_up_proj": (h, 2 * self.inner),
            }
            return joined | output | down
        inputs = {"q_proj": (h, self.query), "k_proj": (h, self.key), "v_proj": (h, self.key)}
        if self.experts:
            return inputs | output
        return inputs | output | {"gate_proj": (h, self.inner), "up_proj": (h, self.inner)} | down

    def expert_weights(self) -> int:
        """Weights of the experts of one layer."""
        return self.experts * 3 * self.hidden * self.inner

    def linear_weights(self) -> int:
        """Weights of the linear layers, router and experts of one layer."""
        dense = sum(rows * columns for rows, columns in self.linear_layers().values())
        return dense + self.experts * self.hidden + self.expert_weights()

    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        layout = self.layout
        small = layout.norms * self.hidden + 2 * self.head_dim * layout.qk_norm
        small += (self.query + 2 * self.key) * layout.qkv_bias + self.hidden * layout.out_bias
        small += self.heads * layout.sinks
        if layout.experts == "clamped":  # biases of experts and router
            small += self.experts * (2 * self.inner + self.hidden + 1)
        return self.linear_weights() + small

    def parameter_sizes(self) -> list[int]:
        """Elements of each parameter in the order of the model; biases and other small ones of a
        layer as one."""
        linear = [rows * columns for rows, columns in self.linear_layers().values()]
        if self.experts:
            linear += [self.expert_weights() * 2 // 3, self.expert_weights() // 3]
        layer = [*linear, self.layer_parameters() - sum(linear)]
        head = [] if self.tied else [self.embedding_parameters()]
        return [self.embedding_parameters(), *(layer * self.layers), self.hidden, *head]

    def embedding_parameters(self) -> int:
        """Parameters of the input embedding; the vocabulary head has as many."""
        return self.vocabulary * self.hidden

    def backbone_parameters(self) -> int:
        """All but the vocabulary head."""
        return self.layers * self.layer_parameters() + self.hidden + self.embedding_parameters()

    def parameters(self) -> int:
        """Of the language model; a tied head counts once."""
        return self.backbone_parameters() + (0 if self.tied else self.embedding_parameters())

    def adapter_parameters(self, rank: int, targets: frozenset[str] | None = None) -> int:
        """Of LoRA adapters on ``targets`` (None: every linear layer), experts left out."""
        layers = self.linear_layers().items()
        sizes = [i + o for name, (i, o) in layers if targets is None or name in targets]
        return self.layers * rank * sum(sizes)


def _sizes(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    layout = LAYOUTS[family]
    heads = config["num_attention_heads"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    return {
        "family": family,
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "inner": config.get("moe_intermediate_size") or config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "tied": bool(config.get("tie_word_embeddings", family.startswith("gemma"))),
        "layout": layout,
        "experts": experts,
        "experts_per_token": config.get("num_experts_per_tok", 0) if experts else 0,
        "caps_scores": config.get("attn_logit_softcapping") is not None,
        "caps_logits": config.get("final_logit_softcapping") is not None,
    }


@cache
def built_in() -> dict[str, str]:
    """Names of the built-in configurations, short ("Qwen3-8B") and of the hub ("Qwen/Qwen3-8B"),
    with the latter."""
    names = [str(load_json(path)["_name_or_path"]) for path in sorted(SHAPES.glob("*.json"))]
    return {name: name for name in names} | {name.split("/")[1]: name for name in names}


def _plain(name: str) -> str:
    """Without what trained variants of one shape add to its name."""
    return re.sub(r"-(base|instruct|it|pt)$", "", name.lower())


def built_in_name(model: str) -> str | None:
    """The hub name of the built-in configuration of ``model``; None where there is none."""
    return {_plain(name): full for name, full in built_in().items()}.get(_plain(model))


def load_shape(model: str) -> ModelShape:
    """The shape of a directory with ``config.json``, or of a built-in name, whose "-Base" and
    "-Instruct" have the same.

    Raises ValueError for neither, naming those that are built in.
    """
    file = Path(model) / "config.json"
    if file.is_file():
        check_small_files(model)
        return ModelShape.of(load_json(file))
    if (full := built_in_name(model)) is None:
        known = ", ".join(sorted(set(built_in().values()), key=str.lower))
        raise ValueError(
            f"{model}: expected a directory with config.json or one of {known}; found neither"
        )
    return ModelShape.of(load_json(SHAPES / f"{full.split('/')[1]}.json"))
