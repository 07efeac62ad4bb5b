"""Models that are not trained: the reference, and in RL the reward model, whole or split over
processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coati.models.head_outputs import HeadRequest
from coati.models.padding_free import PaddingFree
from coati.parallel.boost import (
    apply_kernels,
    check_scalar,
    make_plugin,
    padding_free_of,
    prepare_colossalai,
)
from coati.parallel.compat.cpu.malloc import align_weights
from coati.parallel.engine import Engine
from coati.parallel.families import prepare_family
from coati.parallel.objective import Batch
from coati.parallel.plugin_checks import resolve_options
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.parallel.token_budget import TokenBudget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Unboosted:
    """In a booster's place, for a model that every process holds whole."""

    plugin = None


class InferenceModel:
    """A model that is only run forward.

    ``adapters_off``: the model is the policy itself, with its LoRA adapters switched off meanwhile.
    ``offload``: its weights are in host memory except inside :meth:`on_device`.
    """

    def __init__(self, engine: Engine, adapters_off: bool = False, offload: bool = False) -> None:
        self.engine = engine
        self.adapters_off = adapters_off
        self.offload = offload
        if offload:
            engine.module.to("cpu")

    @classmethod
    def plain(cls, model: nn.Module) -> "InferenceModel":
        """``model`` as it is, on every process whole."""
        return cls(Engine(_Unboosted(), model.eval()))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """With ``offload``: the weights are on the engine's device meanwhile. Enter it once for all
        batches in a row."""
        if self.offload:
            self.engine.module.to(self.engine.device)
        try:
            yield
        finally:
            if self.offload:
                self.engine.module.to("cpu")

    def token_budget(self, lengths: Sequence[int], rows: int | None = None) -> TokenBudget:
        """:meth:`Engine.token_budget <coati.parallel.engine.Engine.token_budget>`."""
        return self.engine.token_budget(lengths, rows)

    def forward_only(
        self,
        batch: Batch,
        read: Callable[[Any, Batch], Tensor],
        head_request: HeadRequest | None = None,
        rows_together: int | None = None,
    ) -> Tensor:
        """(n,) as :meth:`Engine.forward_only <coati.parallel.engine.Engine.forward_only>`, with the
        adapters off where the model is the policy itself."""
        # disable_adapter is the adapted module's; the wrappers around it know nothing of it.
        off = self.engine.module.disable_adapter() if self.adapters_off else nullcontext()
        with off:
            return self.engine.forward_only(
                batch, read, head_request=head_request, rows_together=rows_together
            )


def boost_for_inference(model: nn.Module, options: ParallelOptions) -> Engine:
    """``model`` for inference in the precision of ``options``, split as they say, without an
    optimizer.

    Gemini, tensor and pipeline parallelism get a plugin instance of their own. The other plugins do
    not split weights: there the model stays plain (DDP refuses modules without trainable
    parameters).
    """
    options, _ = resolve_options(options)
    options = replace(
        options, zero_stage=0, zero_cpu_offload=False, grad_checkpoint=False, lora=False
    )
    prepare_colossalai()
    model.eval()
    prepare_family(model, options)
    model.to(DTYPES[options.precision or "fp32"])
    apply_kernels(model, options)  # which looks at the precision
    if not torch.cuda.is_available():
        align_weights(model)
    if not (PLUGINS[options.plugin].sharded_forward or options.model_parallel_size > 1):
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        model.requires_grad_(False).to(device)
        padding_free = padding_free_of(model, options) if on_gpu else PaddingFree.of(model)
        return Engine(_Unboosted(), model, options=options, padding_free=padding_free)
    from colossalai.booster import Booster

    check_scalar(model, options)
    if options.pp > 1:
        model.config.use_cache = False
    # Its parameters keep requires_grad, without which the plugin's own DDP refuses them.
    booster = Booster(plugin=make_plugin(options))
    boosted, *_ = booster.boost(model)
    return Engine(booster, boosted, options=options)
