"""Forward, backward and optimizer step for one model. Callers are the same with and without
pipeline parallelism."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coati.models.block_mask import with_block_mask
from coati.models.head import Head, head_unsupported, logprobs_from_logits
from coati.models.head_outputs import HeadOutputs, HeadRequest, outputs_from_logits
from coati.models.padding_free import PaddingFree
from coati.parallel.mesh import Mesh, inner_module
from coati.parallel.objective import Batch, LossPart, NonFiniteLoss, Objective, Step, concatenate
from coati.parallel.plugins import ParallelOptions
from coati.utils.distributed import all_gather_object
from coati.utils.liveness import tick
from coati.utils.logging import get_logger
from coati.utils.meter import MaskedSamples

logger = get_logger(__name__)

# With --packing, batches hold these beside the objective's model_keys.
PACKING_KEYS = ("position_ids",)
# The model inputs that PaddingFree.unpad can replace.
UNPADDED_KEYS = {"input_ids", "attention_mask", "position_ids"}


def _no_request(batch: Batch) -> HeadRequest | None:
    return None


@dataclass(frozen=True)
class _Call:
    """How the model is called: the batch keys it gets, the temperature (None: the engine's), and
    what the vocabulary head is asked for."""

    model_keys: tuple[str, ...] = Objective.model_keys
    temperature: float | None = None
    head_request: Callable[[Batch], HeadRequest | None] = _no_request


class Engine:
    """A boosted model with its optimizer and learning-rate schedule.

    ``options``: those of :func:`~coati.parallel.boost.boost`; without them (a model that the caller
    boosted) settings are read from the plugin where it has them. ``padding_free`` removes the
    padding of batches, for models that support it.
    """

    def __init__(
        self,
        booster,
        model: nn.Module,
        optimizer=None,
        lr_scheduler=None,
        options: ParallelOptions | None = None,
        padding_free: PaddingFree | None = None,
    ):
        self.booster = booster
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.plugin = booster.plugin
        self.options = options or ParallelOptions()
        self.mesh = Mesh.of(self.plugin)
        self.module = inner_module(model)
        parameter = next(self.module.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        self.scalar = hasattr(self.module, "backbone")  # a reward model or critic
        self.pipelined = self.mesh.pp_size > 1
        # With one process DDP's reducer has nothing to reduce, but would copy every gradient. An
        # optimizer of ZeRO has no gradients before its own reduction, which cannot be skipped.
        wrapped = getattr(model, "module", None)
        is_ddp = isinstance(wrapped, DistributedDataParallel)
        is_zero = hasattr(optimizer, "_partition_grads")
        self._skip_reducer = is_ddp and not is_zero and dist.get_world_size() == 1
        # Keys of the current pipelined batch that the model does not take.
        self._extra_keys: set[str] = set()
        self.padding_free = padding_free
        self.temperature = 1.0  # of log-probs: log_softmax(logits / temperature)
        self._call = _Call()
        self._install_head()
        if self.pipelined:
            self.module.register_forward_pre_hook(self._before_stage_forward, with_kwargs=True)

    def _install_head(self) -> None:
        embedding = self.module.get_output_embeddings()
        reason = None if self.scalar else head_unsupported(self.module.config)
        if embedding is None and self.mesh.last_stage and not self.scalar:
            reason = f"{type(self.module).__name__} names no output embedding"
        if reason:
            logger.warning_once(
                f"{reason}: its full logits are materialized, which takes more memory than the "
                "library's chunked head."
            )
        if hasattr(embedding, "gather_output"):
            embedding.gather_output = True  # shardformer/policies/qwen2.py:427 leaves it split
        agree = self._max_over_ranks if self.mesh.sharded_forward else None
        self.head = None if reason else Head.install(self.module, agree_on_chunks=agree)

    def _max_over_ranks(self, count: int) -> int:
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def train_step(
        self,
        micro_batches: list[Batch],
        objective: Objective,
        stop: bool = False,
        *,
        weight: float = 1.0,
        aux_losses: Sequence[LossPart] = (),
    ) -> Step:
        """Forward and backward over ``micro_batches``, then one update.

        ``stop``: this rank asks to stop after the step; :attr:`Step.stop` is then True on all
        ranks. ``aux_losses``: further parts of the step's loss, each with its own micro-batches,
        objective and weight; ``weight`` is that of ``micro_batches``.

        The sum of each part is divided by the number of its terms over all data-parallel ranks, so
        neither the split into micro-batches nor the number of ranks changes the loss.

        Raises:
            NonFiniteLoss: on every rank, before the update.
        """
        parts = [
            replace(part, micro_batches=self._prepared(part))
            for part in (LossPart(micro_batches, objective, weight), *aux_losses)
        ]
        sizes = [sum(map(part.objective.num_terms, part.micro_batches)) for part in parts]
        seen = sum(b["attention_mask"].sum() for part in parts for b in part.micro_batches)
        counts = self._reduced([size * self.mesh.is_loss_rank for size in (*sizes, seen)])
        self.model.train()
        sums = []
        metrics: dict[str, list] = {}
        for part, count in zip(parts, counts, strict=False):
            scale = (part.weight * self.mesh.dp_size / count.where(count > 0, 1.0)).float()
            total = self._loss_of(part, metrics, scale, sync=part is parts[-1])
            sums.append(total * self.mesh.is_loss_rank)
        reduced = self._reduced([*sums, float(stop)])
        *totals, stops = reduced.tolist()  # the first host synchronization of the step
        *terms, tokens = map(_number, counts.tolist())
        losses = [total / (count or 1) for total, count in zip(totals, terms, strict=True)]
        if not all(map(math.isfinite, losses)):
            self.optimizer.zero_grad()
            bad = next(loss for loss in losses if not math.isfinite(loss))
            raise NonFiniteLoss(f"the loss of this step is {bad}")
        return Step(
            losses[0], terms[0], int(tokens), stops > 0, self._update(), metrics, losses[1:]
        )

    def _prepared(self, part: LossPart) -> list[Batch]:
        prepare = part.objective.prepare
        batches = [self._to_device(prepare(batch)) for batch in part.micro_batches]
        return part.objective.prepare_step(batches)

    @torch.no_grad()
    def forward_only(
        self,
        batch: Batch,
        read: Callable[[Tensor, Batch], Tensor],
        *,
        model_keys: tuple[str, ...] = Objective.model_keys,
        temperature: float | None = None,
    ) -> Tensor:
        """(n,) fp32: ``read(logps, batch)`` of a forward in evaluation mode without gradient, in
        the order of the rows; ``logps`` as in :meth:`Objective.loss`. Nothing is reduced over
        data-parallel ranks.

        ``temperature``: by default the engine's. Under pipeline parallelism only the last stage has
        the result; the others return one zero per row.
        """
        self.model.eval()
        found: list[Tensor] = []

        def consume(logps: Tensor, micro_batch: Batch) -> Tensor:
            found.append(read(logps, micro_batch).detach().float())
            return found[-1].sum()

        self._run([self._to_device(batch)], _Call(model_keys, temperature), consume, None)
        if not found:
            return torch.zeros(len(batch["input_ids"]), device=self.device)
        return torch.cat(found)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Step:
        """Loss per term over ``batches``, and the metric samples of all ranks, in host memory.
        Every rank must pass the same number of batches."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        terms = torch.zeros_like(total)
        metrics: dict[str, list] = {}
        for batch in batches:
            part = LossPart([self._to_device(objective.prepare(batch))], objective)
            total += self._loss_of(part, metrics, None)
            terms += objective.num_terms(part.micro_batches[0])
        loss, count = self.sum_over_dp([total, terms])
        local = {
            name: [_selected(samples).cpu() for samples in values]
            for name, values in (metrics.items() if self.mesh.is_loss_rank else ())
        }
        by_rank = all_gather_object(local)
        names = dict.fromkeys(chain(*by_rank))
        merged = {name: [t for rank in by_rank for t in rank.get(name, [])] for name in names}
        return Step(loss / (count or 1), _number(count), metrics=merged)

    def forward(self, batch: Batch, model_keys: tuple[str, ...] = Objective.model_keys) -> Tensor:
        """(n,) log-probs of the tokens supervised by ``batch["labels"]``; (B,) scores or (B, S)
        values from a model with a scalar head."""
        self._call = _Call(model_keys)
        return self._forward(batch)

    def _forward(self, batch: Batch) -> Any:
        keys = (*self._call.model_keys, *PACKING_KEYS)
        inputs = self._prepare_inputs(batch, {key: batch[key] for key in keys if key in batch})
        tick()
        try:
            outputs = self.model(**inputs, use_cache=False)
        finally:
            self._clear_head()
        return self._read(outputs, batch)

    def _loss_of(
        self, part: LossPart, metrics: dict[str, list], scale: Tensor | None, sync: bool = True
    ) -> Tensor:
        """The sum of the loss's terms, an fp64 scalar; metric samples are appended to ``metrics``.
        With ``scale`` also the backward of loss x scale, reduced over ranks if ``sync``."""
        objective = part.objective
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def consume(logps: Tensor, micro_batch: Batch) -> Tensor:
            loss, samples = objective.loss(logps, micro_batch)
            total.add_(loss.detach())
            for name, values in samples.items():
                metrics.setdefault(name, []).append(_detached(values))
            return loss

        call = _Call(objective.model_keys, objective.temperature, objective.head_request)
        self._run(part.micro_batches, call, consume, scale, sync)
        return total

    def _run(
        self,
        micro_batches: list[Batch],
        call: "_Call",
        consume: Callable[[Any, Batch], Tensor],
        scale: Tensor | None,
        sync: bool = True,
    ) -> None:
        """``consume(outputs, batch)`` after each forward, and the backward of its result x
        ``scale`` unless that is None. The one branch on pipeline parallelism."""
        self._call = call
        try:
            if self.pipelined:
                self._run_pipeline(micro_batches, consume, scale)
            else:
                self._run_plain(micro_batches, consume, scale, sync)
        finally:
            self._call = _Call()

    def _run_plain(self, micro_batches, consume, scale, sync: bool) -> None:
        for index, batch in enumerate(micro_batches):
            last = sync and index == len(micro_batches) - 1
            reduces = scale is None or (last and not self._skip_reducer)
            with nullcontext() if reduces else self._no_sync():
                loss = consume(self._forward(batch), batch)
                if scale is not None:
                    self.booster.backward(loss * scale, self.optimizer)

    def _no_sync(self):
        # ZeRO-2 and Gemini accumulate reduced gradients; the others reduce after the last
        # micro-batch.
        partitioned = getattr(self.optimizer, "_partition_grads", False)
        if partitioned or self.mesh.sharded_forward or not self.plugin.support_no_sync():
            return nullcontext()
        return self.booster.no_sync(self.model, self.optimizer)

    def _run_pipeline(self, micro_batches, consume, scale) -> None:
        batch = concatenate(micro_batches)
        schedule = self._reset_schedule(len(batch["input_ids"]))
        self._extra_keys = set(batch) - {*self._call.model_keys, *PACKING_KEYS}

        def criterion(outputs: Any, micro_batch: Batch) -> Tensor:
            self._clear_head()
            loss = consume(self._read(outputs, micro_batch), micro_batch)
            # Undo the schedule's division by the number of micro-batches (one_f_one_b.py:272):
            # ``scale`` already divides by the number of terms.
            return loss * (1.0 if scale is None else scale) * schedule.num_microbatches

        optimizer = self.optimizer if scale is not None else None
        with self.model.no_sync() if scale is None else nullcontext():
            self.booster.execute_pipeline(
                iter([batch]), self.model, criterion, optimizer, return_loss=False
            )
        self._clear_head()

    def _reset_schedule(self, rows: int):
        # The schedule keeps the sizes of its last batch, which an evaluation or a step of another
        # size changes.
        schedule = self.plugin.scheduler
        size = min(self.options.microbatch_size, rows)
        schedule.last_batch_size = None
        schedule.microbatch_size = size
        schedule.num_microbatches = max(1, rows // size)
        return schedule

    def _before_stage_forward(self, module: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of a pipeline stage: give the labels of the micro-batch to the head, and
        drop the keys that the model does not take."""
        if self.mesh.last_stage:
            self._set_head(kwargs)
        inputs = {key: value for key, value in kwargs.items() if key not in self._extra_keys}
        tick()
        return args, with_block_mask(inputs, self.dtype)

    def _prepare_inputs(self, batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Give the head the batch's labels; returns ``inputs``, without padding where possible."""
        unpadded = None
        if self.padding_free and self.head and set(inputs) <= UNPADDED_KEYS:
            unpadded = self.padding_free.unpad(batch)
        if unpadded is None:
            self._set_head(batch)
            return with_block_mask(inputs, self.dtype)
        if "labels" in batch:
            self.head.set_targets(unpadded.targets, request=self._call.head_request(batch))
            self.head.temperature = self._temperature()
        return unpadded.inputs

    def _set_head(self, batch: Batch) -> None:
        if self.head is not None and "labels" in batch:
            self.head.set(batch["labels"], request=self._call.head_request(batch))
            self.head.temperature = self._temperature()

    def _temperature(self) -> float:
        return self.temperature if self._call.temperature is None else self._call.temperature

    def _clear_head(self) -> None:
        if self.head is not None:
            self.head.clear()

    def _read(self, outputs: Any, batch: Batch) -> Any:
        # Gemini returns ColoTensors, whose in-place operations have no effect
        # (tensor/colo_tensor.py:6).
        if self.scalar:
            return outputs.as_subclass(Tensor)
        logits = outputs["logits"].as_subclass(Tensor)
        request = self._call.head_request(batch)
        temperature = self._temperature()
        if request is not None:
            if self.head is not None:
                return _without_batch_dim(self.head.take())
            return _without_batch_dim(
                outputs_from_logits(logits, batch["labels"], request, temperature=temperature)
            )
        if self.head is not None:  # which returned log-probs in place of logits
            return logits[0]
        return logprobs_from_logits(logits, batch["labels"], temperature=temperature)[0]

    def _update(self) -> float | None:
        scale = self._loss_scale()
        if hasattr(self.optimizer, "_current_grad_norm"):
            self.optimizer._current_grad_norm = None
        self.optimizer.step()
        try:
            norm = self.optimizer.get_grad_norm()
        except NotImplementedError:  # plain DDP's, in a model that the caller boosted
            norm = None
        self.optimizer.zero_grad()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return None if norm is None else float(norm) / scale

    def _loss_scale(self) -> float:
        scaler = grad_scaler(self.optimizer)
        return float(scaler.scale) if scaler is not None else 1.0

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def all_ranks(self, flag: bool) -> bool:
        """Logical and of ``flag`` over all ranks."""
        return self._reduced([float(not flag)]).item() == 0

    def sum_over_dp(self, values: Sequence[Tensor | float]) -> list[float]:
        """Sums over data-parallel ranks of numbers that are equal within a model-parallel
        group."""
        return self._reduced([value * self.mesh.is_loss_rank for value in values]).tolist()

    def sum_tensor_over_dp(self, sums: Tensor) -> Tensor:
        """:meth:`sum_over_dp` of a tensor of any shape, in fp64 on its device; the host is not
        synchronized."""
        values = list(sums.flatten() * self.mesh.is_loss_rank)
        return self._reduced(values).to(sums.device).view(sums.shape)

    def _reduced(self, values: Sequence[Tensor | float]) -> Tensor:
        """(n,) fp64 sums over all ranks, on the device. The caller multiplies by
        ``mesh.is_loss_rank`` what must count once per data-parallel rank."""
        stacked = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float64).to(self.device, non_blocking=True)
                for value in values
            ]
        )
        dist.all_reduce(stacked)
        return stacked


def grad_scaler(optimizer):
    """The dynamic loss scaler of ColossalAI's fp16 optimizers, or None."""
    for name in ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision"):
        scaler = getattr(getattr(optimizer, name, None), "grad_scaler", None)
        if scaler is not None:
            return scaler
    return None


def _number(count: float) -> int | float:
    """Of terms: a whole number, or a sum of weights."""
    return int(count) if count.is_integer() else count


def _detached(samples: Tensor | MaskedSamples) -> Tensor | MaskedSamples:
    if isinstance(samples, MaskedSamples):
        return samples.detached()
    return samples.detach().float().reshape(-1)


def _selected(samples: Tensor | MaskedSamples) -> Tensor:
    return samples.selected() if isinstance(samples, MaskedSamples) else samples


def _without_batch_dim(outputs: HeadOutputs) -> HeadOutputs:
    """(1, n) fields as (n,)."""
    names = ("logps", "entropy", "logsumexp")
    found = {name: getattr(outputs, name) for name in names}
    return replace(outputs, **{name: t[0] for name, t in found.items() if t is not None})
