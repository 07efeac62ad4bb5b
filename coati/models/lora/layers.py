"""peft's LoRA layers with PiSSA that leaves the base weights alone, and dropout on an
embedding's adapter."""

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from coati.models.lora.quantized_base import QuantizedLinear, named_otherwise


class PissaLinear(lora.Linear):
    """A LoRA layer that starts from the principal singular vectors (PiSSA, arXiv 2404.02948) and
    keeps its base weight.

    PiSSA trains A and B from their principal values A0, B0 over the residual ``W - s B0 A0``. Here
    W stays as it is and the frozen ``s B0 A0`` is subtracted in the forward pass: the same function
    and gradients, but the base model is still there with the adapter off (as a reference, say),
    16-bit weights are not rounded again, and [A; A0], [B, -B0] saved together are an ordinary
    adapter of rank 2r for the ordinary base.
    """

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """peft's initialization, without its change of the base weight."""
        base = self.get_base_layer()
        original = base.weight.data
        super().pissa_init(adapter_name, init_lora_weights)
        base.weight.data = original

    def freeze_start(self) -> None:
        """Keep what A and B are now as A0 and B0; to be called when their type and device are
        settled."""
        (adapter,) = self.lora_A
        self.pissa_A = nn.Parameter(
            self.lora_A[adapter].weight.detach().clone(), requires_grad=False
        )
        self.pissa_B = nn.Parameter(
            self.lora_B[adapter].weight.detach().clone(), requires_grad=False
        )

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.lora_A
        result = self.base_layer(x)
        # One dropout for both: with two, the start would be noise instead of the base model.
        dropped = self.lora_dropout[adapter](x.to(self.pissa_A.dtype))
        update = self.lora_B[adapter](self.lora_A[adapter](dropped))
        update = update - F.linear(F.linear(dropped, self.pissa_A), self.pissa_B)
        return result + (update * self.scaling[adapter]).to(result.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (B A - B0 A0), (out, in): what merging adds to the base weight."""
        start = self.scaling[adapter] * (self.pissa_B.float() @ self.pissa_A.float())
        return super().get_delta_weight(adapter) - start.to(self.pissa_A.dtype)


class QuantizedLora(lora.Linear):
    """A LoRA layer over a :class:`~coati.models.lora.quantized_base.QuantizedLinear`.

    DoRA's is its own: peft's multiplies with the dequantized weight a second time and keeps that
    for the backward pass, one of each layer.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        (adapter,) = self.lora_A
        if not self.use_dora[adapter] or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        result = base(x)
        dropped = self.lora_dropout[adapter](x)
        update = self.lora_B[adapter](self.lora_A[adapter](dropped.to(self._width(adapter))))
        magnitude = self.lora_magnitude_vector[adapter].weight
        ratio = magnitude / self._norm(adapter).to(magnitude.dtype)
        difference = (ratio - 1) * base.product(dropped) + ratio * update * self.scaling[adapter]
        return result + difference.to(result.dtype)

    def _width(self, adapter: str) -> torch.dtype:
        return self.lora_A[adapter].weight.dtype

    @torch.no_grad()
    def _norm(self, adapter: str) -> Tensor:
        """(out,) norms of the rows of W + s B A, constants to the gradient (section 4.3)."""
        weight = self.get_base_layer().dequantized(torch.float32)
        factors = (self.lora_B[adapter].weight.float(), self.lora_A[adapter].weight.float())
        with torch.autocast(weight.device.type, enabled=False):
            weight.addmm_(*factors, alpha=self.scaling[adapter])
        return weight.norm(dim=1)


class DroppedEmbedding(lora.Embedding):
    """peft's LoRA embedding, whose dropout is stored but never applied, with the dropout
    applied."""

    def _embed(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        # Called for the adapter's half only: (B, S, r). With one adapter, its dropout is the only
        # one there.
        (dropout,) = self.lora_dropout.values()
        return dropout(super()._embed(input, weight, *args, **kwargs))


def adapter_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """Every LoRA layer of ``model`` by its module name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)
    }


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRA knows this kind of layer: Linear, quantized or not, Embedding and GPT-2's
    transposed Conv1D."""
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear | nn.Embedding | Conv1D | QuantizedLinear
    return isinstance(module, kinds) and not named_otherwise(module)


def tied_head(model: nn.Module) -> nn.Module | None:
    """The output embedding if it shares the input embedding's weight and one of them carries an
    adapter.

    Merging would change both sides of such a model by an adapter of one; the head needs a weight of
    its own first.
    """
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        return None
    sides = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in sides or not any(isinstance(side, lora.LoraLayer) for side in sides):
        return None
    entrance, head = (
        side.get_base_layer() if isinstance(side, lora.LoraLayer) else side for side in sides
    )
    return head if entrance.weight is head.weight else None
