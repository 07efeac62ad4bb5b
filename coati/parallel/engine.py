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
from coati.models.head_outputs import HeadRequest, outputs_from_logits
from coati.models.padding_free import PaddingFree
from coati.parallel.mesh import Mesh, inner_module
from coati.parallel.objective import Batch, LossPart, NonFiniteLoss, Objective, Step, concatenate
from coati.parallel.optimizer import grad_scaler
from coati.parallel.plugins import ParallelOptions
from coati.parallel.step_work import PassWork, StepClock
from coati.parallel.token_budget import RowsOfAStep, TokenBudget, restored, row_lengths
from coati.utils.distributed import all_gather_object
from coati.utils.liveness import tick
from coati.utils.logging import get_logger
from coati.utils.meter import detached, selected

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
        self.work = PassWork.of(self.module, self.scalar)
        self.clock = StepClock(self.device)
        # With one process DDP's reducer has nothing to reduce, but would copy every gradient. An
        # optimizer of ZeRO has no gradients before its own reduction, which cannot be skipped.
        wrapped = getattr(model, "module", None)
        is_ddp = isinstance(wrapped, DistributedDataParallel)
        is_zero = hasattr(optimizer, "_partition_grads")
        self._skip_reducer = is_ddp and not is_zero and dist.get_world_size() == 1
        # Keys of the current pipelined batch that the model does not take.
        self._extra_keys: set[str] = set()
        self.padding_free = padding_free
        self.share_prefixes = True  # where padding_free finds that the model can
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
        neither the split into micro-batches nor the number of ranks changes the loss. With
        ``options.tokens_per_batch`` they are cut anew.

        Raises:
            NonFiniteLoss: on every rank, before the update.
        """
        with self.clock.timed("prepare"):
            parts = [
                replace(part, micro_batches=self._prepared(part))
                for part in (LossPart(micro_batches, objective, weight), *aux_losses)
            ]
        sizes = [sum(map(part.objective.num_terms, part.micro_batches)) for part in parts]
        seen = sum(b["attention_mask"].sum() for part in parts for b in part.micro_batches)
        counts = self._reduced([size * self.mesh.is_loss_rank for size in (*sizes, seen)])
        self._set_mode(training=True)
        sums = []
        metrics: dict[str, list] = {}
        for part, count in zip(parts, counts, strict=False):
            scale = (part.weight * self.mesh.dp_size / count.where(count > 0, 1.0)).float()
            total = self._loss_of(part, metrics, scale, sync=part is parts[-1])
            sums.append(total * self.mesh.is_loss_rank)
        with self.clock.timed("waiting"):
            reduced = self._reduced([*sums, float(stop)])
        *totals, stops = reduced.tolist()  # of padded batches the first wait for the device
        *terms, tokens = map(_number, counts.tolist())
        losses = [total / (count or 1) for total, count in zip(totals, terms, strict=True)]
        if not all(map(math.isfinite, losses)):
            self.optimizer.zero_grad()
            bad = next(loss for loss in losses if not math.isfinite(loss))
            raise NonFiniteLoss(f"the loss of this step is {bad}")
        with self.clock.timed("optimizer"):
            norm = self._update()
        return Step(losses[0], terms[0], int(tokens), stops > 0, norm, metrics, losses[1:])

    def _set_mode(self, training: bool) -> None:
        self.model.train(training)
        # Gemini's wrapper passes it on to the children of the model, not to the model itself
        # (zero/gemini/gemini_ddp.py:233).
        self.module.train(training)

    def _prepared(self, part: LossPart) -> list[Batch]:
        objective = part.objective
        batches = [objective.prepare(batch) for batch in part.micro_batches]
        lengths = row_lengths(batches) if self.options.tokens_per_batch else None
        batches = objective.prepare_step([self._to_device(batch) for batch in batches])
        return batches if lengths is None else self._cut(batches, lengths, objective)

    def _cut(self, batches: list[Batch], lengths: list[int], objective: Objective) -> list[Batch]:
        """The rows of ``batches`` as micro-batches of ``options.tokens_per_batch``, as many on
        every rank: some plugins reduce gradients, and some objectives sums, after each."""
        budget = self.token_budget(lengths, aligned=dist.get_world_size() > 1)
        rows = RowsOfAStep(batches, lengths, objective.token_keys(), budget.multiple)
        return [rows.take(cut) for cut in budget.cut(lengths, objective.rows_together)]

    def token_budget(
        self, lengths: Sequence[int], rows: int | None = None, aligned: bool | None = None
    ) -> TokenBudget:
        """How rows of ``lengths`` are cut for a forward: into ``options.tokens_per_batch``, without
        it into what ``rows`` of the longest take; and into as many on every rank where a forward of
        this model holds collectives."""
        free = self.padding_free if self.head else None
        longest = max(lengths, default=0)
        if aligned is None:
            aligned = self.mesh.sharded_forward and dist.get_world_size() > 1
        return TokenBudget.of(
            self.options,
            rows or len(lengths),
            longest,
            padded=free is None or longest > free.longest,
            aligned=aligned,
            device=self.device,
        )

    @torch.no_grad()
    def forward_only(
        self,
        batch: Batch,
        read: Callable[[Any, Batch], Tensor],
        *,
        model_keys: tuple[str, ...] = Objective.model_keys,
        temperature: float | None = None,
        head_request: HeadRequest | None = None,
        rows_together: int | None = None,
    ) -> Tensor:
        """(n,) fp32: ``read(logps, batch)`` of a forward in evaluation mode without gradient, in
        the order of the rows; ``logps`` as in :meth:`Objective.loss`. Nothing is reduced over
        data-parallel ranks.

        ``rows_together``: ``read`` gives one number for each row, for which it needs so many
        consecutive ones; several forwards may then take ``options.tokens_per_batch`` each.
        ``temperature``: by default the engine's. ``head_request``: ``read`` is given the
        :class:`~coati.models.head_outputs.HeadOutputs` of it. Under pipeline parallelism only the
        last stage has the result; the others return one zero per row.
        """
        self._set_mode(training=False)
        found: list[Tensor] = []

        def consume(logps: Tensor, micro_batch: Batch) -> Tensor:
            found.append(read(logps, micro_batch).detach().float())
            return found[-1].sum()

        call = _Call(model_keys, temperature, lambda _: head_request)
        lengths = row_lengths([batch]) if self.options.tokens_per_batch else []
        batch = self._to_device(batch)
        if rows_together is None or not lengths:
            self._run([batch], call, consume, None)
            if not found:
                return torch.zeros(len(batch["input_ids"]), device=self.device)
            return torch.cat(found)
        budget = self.token_budget(lengths)
        rows = RowsOfAStep([batch], lengths, multiple=budget.multiple)
        cuts = budget.cut(lengths, rows_together)
        self._run([rows.take(cut) for cut in cuts], call, consume, None)
        return restored(found, cuts)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Step:
        """Loss per term over ``batches``, and the metric samples of all ranks, in host memory.
        Every rank must pass the same number of batches."""
        self._set_mode(training=False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        terms = torch.zeros_like(total)
        metrics: dict[str, list] = {}
        for batch in batches:
            prepared = objective.prepare(batch)
            micro_batches = [self._to_device(prepared)]
            if self.options.tokens_per_batch:
                micro_batches = self._cut(micro_batches, row_lengths([prepared]), objective)
            total += self._loss_of(LossPart(micro_batches, objective), metrics, None)
            terms += sum(map(objective.num_terms, micro_batches))
        loss, count = self.sum_over_dp([total, terms])
        local = {
            name: [selected(samples).cpu() for samples in values]
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
        shared = inputs["position_ids"] if "shared_prefixes" in inputs else None
        self.work.add_batch(batch, torch.is_grad_enabled(), shared)
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
                metrics.setdefault(name, []).append(detached(values))
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
                with self.clock.timed("pipeline") if scale is not None else nullcontext():
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
                if scale is None:
                    consume(self._forward(batch), batch)
                    continue
                with self.clock.timed("forward"):
                    loss = consume(self._forward(batch), batch)
                with self.clock.timed("backward"):
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
        self.work.add_batch(batch, trained=scale is not None)
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
            share = self.shares_prefixes(self.module.training)
            unpadded = self.padding_free.unpad(batch, share=share)
        if unpadded is None:
            self._set_head(batch)
            return with_block_mask(inputs, self.dtype)
        if "labels" in batch:
            request = self._call.head_request(batch)
            self.head.set_targets(unpadded.targets, request=request, places=unpadded.places)
            self.head.temperature = self._temperature()
        if self.scalar and unpadded.places is not None:
            return unpadded.inputs | {"row_places": unpadded.places}
        return unpadded.inputs

    def shares_prefixes(self, training: bool) -> bool:
        """Whether rows of a batch that begin alike share these tokens: not where the random numbers
        of training differ from row to row."""
        free = self.padding_free
        if not (free and self.head and self.share_prefixes):
            return False
        return free.shares_in_training if training else free.shares

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
                return self.head.take().without_batch_dim()
            found = outputs_from_logits(logits, batch["labels"], request, temperature=temperature)
            return found.without_batch_dim()
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


def _number(count: float) -> int | float:
    """Of terms: a whole number, or a sum of weights."""
    return int(count) if count.is_integer() else count
