"""A transformer with one number per token in place of its vocabulary head: what reward model and
critic share.

On disk it is what transformers calls a sequence (critic: token) classifier of one label: the
backbone's weights under the names they have in the language model, and ``score.weight``,
``score.bias``.
"""

import copy
import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.logprobs import right_pad_order


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

    Args: pretrained: directory or hub name; its weights without the vocabulary head, and a new
        head. To load a saved head too: :func:`coati.models.scalar_loading.load_scalar_model`.
        config: instead, a transformers configuration: random weights. backbone: instead, a
        transformers model, with or without vocabulary head; its weights are shared, not copied.
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
        **keywords: Any,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (pretrained, config, backbone)) != 1:
            raise ValueError(f"{type(self).__name__} takes one of pretrained, config and backbone")
        if config is not None:
            from transformers import AutoModel

            backbone = AutoModel.from_config(config, **keywords)
        elif pretrained is not None:
            from coati.models.loading import load_backbone

            backbone = load_backbone(pretrained, **keywords)
        backbone = without_head(backbone)
        # Where the language model has it, so that weights keep their names.
        self.base_model_prefix = backbone.base_model_prefix or "model"
        setattr(self, self.base_model_prefix, backbone)
        self.name_or_path = getattr(
            backbone, "name_or_path", ""
        )  # peft looks for it among the plain attributes
        self.config = classifier_config(backbone.config, self.task, self.kind)
        backbone.config = self.config
        self.score = ScalarHead(width_of(self.config))
        self.score.to(next(backbone.parameters()))
        self.init_head()

    @torch.no_grad()
    def init_head(self) -> None:
        """Weight ~ N(0, 1 / (d + 1)), bias 0; from PyTorch's random state, so seed it before."""
        self.score.weight.normal_(std=(self.score.in_features + 1) ** -0.5)
        self.score.bias.zero_()

    @property
    def backbone(self) -> nn.Module:
        """The transformer below the head."""
        return getattr(self, self.base_model_prefix)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, d) with each row's padding at its end, and where each came from: (B,
        S) positions."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        order = right_pad_order(attention_mask)
        moved = {
            "input_ids": input_ids.gather(1, order),
            "attention_mask": attention_mask.gather(1, order),
        }
        return self.backbone(**moved, **keywords)[0], order

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        return None

    def resize_token_embeddings(self, *args: Any, **keywords: Any) -> nn.Module:
        return self.backbone.resize_token_embeddings(*args, **keywords)

    def gradient_checkpointing_enable(self, **keywords: Any) -> None:
        self.backbone.gradient_checkpointing_enable(**keywords)

    def enable_input_require_grads(self) -> None:
        self.backbone.enable_input_require_grads()

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.score.weight.dtype

    @property
    def _supports_attention_backend(self) -> bool:
        return getattr(self.backbone, "_supports_attention_backend", False)


def without_head(model: nn.Module) -> nn.Module:
    """The backbone of a language model; a backbone is returned as it is."""
    return getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model


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
