"""A transformer with one number per token in place of its vocabulary head: what reward model and
critic share.

On disk it is what transformers calls a sequence (critic: token) classifier of one label: the
backbone's weights under the names they have in the language model, and ``score.weight``,
``score.bias``.
"""

import copy
import os
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from coati.models.loading import adapter_base, load_backbone, merge_adapter, quantized
from coati.models.logprobs import right_pad_order
from coati.models.scalar_loading import saved_head, set_head
from coati.utils.transformers_compat import body_name

Scalar = TypeVar("Scalar", bound="BaseModel")


class ScalarHead(nn.Linear):
    """d -> 1 in fp32 whatever the model computes in: scores of a few units, in bf16, would be
    rounded to hundredths."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)

    def forward(self, states: Tensor) -> Tensor:
        """(..., d) -> (...) fp32."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float(), self.bias.float())[..., 0]


class BaseModel(nn.Module):
    """A backbone and a :class:`ScalarHead` named ``score``.

    Args:
        backbone: a transformers model, with or without vocabulary head; its weights are shared, not
            copied.
        keep_lm_head: keep the vocabulary head of ``backbone`` beside the scalar one, where
            :meth:`get_output_embeddings` finds it.
        pretrained, config: instead of ``backbone`` a directory or hub name whose backbone is loaded
            below a new head, or a transformers configuration for random weights (ColossalChat's
            signature). For a saved head see :meth:`from_pretrained`.

    Raises ValueError unless exactly one of the three is given.
    """

    # The modules that LoRA trains whole: they are new, there is nothing to adapt.
    trained_whole: ClassVar[tuple[str, ...]] = ("score",)
    kind: ClassVar[str] = "scalar"
    task: ClassVar[str] = ""  # as in LlamaFor<task>

    def __init__(
        self,
        pretrained: str | os.PathLike | None = None,
        config: Any = None,
        *,
        backbone: nn.Module | None = None,
        keep_lm_head: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (pretrained, config, backbone)) != 1:
            raise ValueError(f"{type(self).__name__} takes one of pretrained, config and backbone")
        if pretrained is not None:
            backbone = load_backbone(pretrained, keep_lm_head=keep_lm_head, **keywords)
        elif config is not None:
            auto_class = AutoModelForCausalLM if keep_lm_head else AutoModel
            backbone = auto_class.from_config(config, **keywords)
        name, head = named_head(backbone) if keep_lm_head else (None, None)
        backbone = without_head(backbone)
        # Where the language model has it, so that weights keep their names.
        self.base_model_prefix = backbone.base_model_prefix or "model"
        setattr(self, self.base_model_prefix, backbone)
        self.lm_head_name = name
        if name is not None:  # after the backbone, whose names tied weights have
            setattr(self, name, head)
        # peft looks for it among the plain attributes.
        self.name_or_path = getattr(backbone, "name_or_path", "")
        self.config = classifier_config(backbone.config, self.task, self.kind)
        backbone.config = self.config
        self.train_padding()
        self.score = ScalarHead(width_of(self.config))
        # Of a quantized base some parameters are codes.
        self.score.to(next(p for p in backbone.parameters() if p.is_floating_point()))
        self.init_head()

    @classmethod
    def from_pretrained(
        cls: type[Scalar],
        path: str | os.PathLike,
        *,
        new_head: bool = False,
        keep_lm_head: bool = False,
        dtype: str = "auto",
        quantize_base: str | None = None,
        **options: Any,
    ) -> Scalar:
        """The model of ``path``: a directory of this library, a classifier of one label, or a PEFT
        adapter, which is merged into its base.

        ``new_head``: a directory without a head is a base to train on; its head is
        initialized at random, which is logged. A saved head is loaded in either case; a critic also
        loads a reward model's.
        ``dtype``, ``quantize_base`` as of :func:`~coati.models.loading.load_causal_lm`;
        ``options``: attn_implementation, trust_remote_code of
        :func:`~coati.models.loading.load_backbone`.

        Raises ValueError when a head is wanted and not there, or is of another width or number of
        labels, and as :func:`~coati.models.loading.load_causal_lm`.
        """
        base = adapter_base(path)
        state = saved_head(cls.kind, path, new_head)
        stored = "auto" if quantize_base and not base else dtype
        backbone = load_backbone(base or path, keep_lm_head=keep_lm_head, dtype=stored, **options)
        model = cls(backbone=backbone, keep_lm_head=keep_lm_head)
        if not base:
            quantized(model, quantize_base, dtype)
        if state is not None:
            set_head(model.score, state, path)
        if base:
            model = quantized(merge_adapter(model, path), quantize_base, dtype)
            # An adapter trained on top names this directory as its base.
            model.name_or_path = str(path)
        return model

    @torch.no_grad()
    def init_head(self) -> None:
        """Weight ~ N(0, 1 / (d + 1)), bias 0; from PyTorch's random state, so seed it before."""
        self.score.weight.normal_(std=(self.score.in_features + 1) ** -0.5)
        self.score.bias.zero_()

    def train_padding(self, row: int | None = None) -> None:
        """A classifier's configuration names the padding, whose embedding transformers does not
        train; with many tokenizers it is eos, which a model that was not saved yet learns. Padding
        itself is left out by masks. A row of zeros stands for nothing else and stays.

        ``row``: the padding that counts, by default the one of the configuration; a saved reward
        model's may be another than that of the base, whose row was zeros in training."""
        embedding = self.get_input_embeddings()
        if row is not None:
            embedding.padding_idx = row
        row = getattr(embedding, "padding_idx", None)
        if row is not None and not embedding.weight.is_meta and embedding.weight[row].any():
            embedding.padding_idx = None

    @property
    def backbone(self) -> nn.Module:
        """The transformer below the head."""
        return getattr(self, self.base_model_prefix)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, d) with each row's padding moved to its end, and the position (B, S)
        each came from."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        order = right_pad_order(attention_mask)
        moved = {
            "input_ids": input_ids.gather(1, order),
            "attention_mask": attention_mask.gather(1, order),
        }
        return self.backbone(**moved, **keywords)[0], order

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' method."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The vocabulary head, where it was kept."""
        return getattr(self, self.lm_head_name) if self.lm_head_name else None

    def resize_token_embeddings(self, *args: Any, **keywords: Any) -> nn.Module:
        """As transformers' method, of the backbone: a kept vocabulary head is not resized."""
        return self.backbone.resize_token_embeddings(*args, **keywords)

    def gradient_checkpointing_enable(self, **keywords: Any) -> None:
        """As transformers' method."""
        self.backbone.gradient_checkpointing_enable(**keywords)

    def enable_input_require_grads(self) -> None:
        """As transformers' method."""
        self.backbone.enable_input_require_grads()

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.score.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's weights, which have the backbone's."""
        return self.score.weight.dtype

    @property
    def _supports_attention_backend(self) -> bool:
        return getattr(self.backbone, "_supports_attention_backend", False)


def named_head(causal_lm: nn.Module) -> tuple[str, nn.Module]:
    """The vocabulary head of a language model and its name there. Raises ValueError for a model
    without one."""
    head = causal_lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"keep_lm_head: {type(causal_lm).__name__} has no vocabulary head")
    return next((name, module) for name, module in causal_lm.named_children() if module is head)


def without_head(model: nn.Module) -> nn.Module:
    """The backbone of a language model; a backbone is returned as it is."""
    name = body_name(model)
    return getattr(model, name) if name else model


def width_of(config: Any) -> int:
    """d of the last hidden states of a model of ``config``."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # OPT may project its states down to the width of its embeddings.
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def classifier_config(config: Any, task: str, kind: str) -> Any:
    """A copy that says what the directory will hold, for transformers (``architectures``) and for
    this library."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.coati_head = kind
    family = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{family}For{task}"]
    return config
