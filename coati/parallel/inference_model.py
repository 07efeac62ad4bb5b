"""The reference model of preference and RL trainers: fixed weights, log-probs without gradient."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coati.models.padding_free import PaddingFree
from coati.parallel.boost import check_scalar, make_plugin, prepare_colossalai
from coati.parallel.engine import Engine
from coati.parallel.families import prepare_family
from coati.parallel.objective import Batch
from coati.parallel.plugins import ParallelOptions, resolve_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Unboosted:
    """In a booster's place, for a model that every process holds whole."""

    plugin = None


class InferenceModel:
    """Numbers per row of a model that is not trained.

    ``adapters_off``: the model is the policy itself; its LoRA adapters are switched off meanwhile.
    ``offload``: it is in host memory except while :meth:`awake`.
    """

    def __init__(self, engine: Engine, adapters_off: bool = False, offload: bool = False) -> None:
        self.engine, self.adapters_off, self.offload = engine, adapters_off, offload
        if offload:
            engine.module.to("cpu")

    @classmethod
    def plain(cls, model: nn.Module) -> "InferenceModel":
        """``model`` as it is, on every process whole."""
        return cls(Engine(_Unboosted(), model.eval()))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """With ``offload``: on the engine's device meanwhile. Around all batches that it gets in a
        row."""
        if self.offload:
            self.engine.module.to(self.engine.device)
        try:
            yield
        finally:
            if self.offload:
                self.engine.module.to("cpu")

    def rows(self, batch: Batch, hooks: Any) -> Tensor:
        """(R,) on the engine's device: the metric ``rows`` of ``hooks`` for the R rows of
        ``batch``. Zeros on the pipeline stages that do not compute it."""
        # disable_adapter is the adapted module's; the wrappers around it know nothing of it.
        off = self.engine.module.disable_adapter() if self.adapters_off else nullcontext()
        with off:
            found = self.engine.collect(batch, hooks)
        return found.get("rows", torch.zeros(len(batch["input_ids"]), device=self.engine.device))


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
    if not (options.plugin.startswith("gemini") or options.model_parallel_size > 1):
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else "cpu"
        )
        model.requires_grad_(False).to(device)
        packing = None if torch.cuda.is_available() else PaddingFree.of(model)
        return Engine(_Unboosted(), model, options=options, packing=packing)
    from colossalai.booster import Booster

    check_scalar(model, options)
    if options.pp > 1:
        model.config.use_cache = False
    # Its parameters keep requires_grad, without which the plugin's own DDP refuses them.
    booster = Booster(plugin=make_plugin(options))
    boosted, *_ = booster.boost(model)
    return Engine(booster, boosted, options=options)
