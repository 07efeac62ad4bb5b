"""One model's step: forward, loss, backward and update, pipelined or not. Nobody above asks
which."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coati.models.block_mask import with_block_mask
from coati.models.head import Head, head_unsupported, logprobs_from_logits
from coati.models.padding_free import PaddingFree
from coati.parallel.mesh import Mesh, inner_module
from coati.parallel.objective import Batch, LossPart, NonFiniteLoss, Objective, Step, concatenate
from coati.parallel.plugins import ParallelOptions
from coati.utils.distributed import all_gather_object
from coati.utils.logging import get_logger

logger = get_logger(__name__)

PACK_KEYS = ("position_ids",)  # in batches of packs, beside a trainer's model_keys
PACKABLE = {"input_ids", "attention_mask", "position_ids"}


class Engine:
    """A boosted model with its optimizer and schedule.

    ``options`` may be left out when the caller boosted the model by hand; then only what the plugin
    itself knows is used. ``packing`` lays batches end to end instead of padding them, for models
    that can be given such rows.
    """

    def __init__(
        self,
        booster,
        model: nn.Module,
        optimizer=None,
        lr_scheduler=None,
        options: ParallelOptions | None = None,
        packing: PaddingFree | None = None,
    ):
        self.booster, self.model, self.optimizer, self.lr_scheduler = (
            booster,
            model,
            optimizer,
            lr_scheduler,
        )
        self.plugin = booster.plugin
        self.options = options or ParallelOptions()
        self.mesh = Mesh.of(self.plugin)
        self.module = inner_module(model)
        parameter = next(self.module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.pipelined = self.mesh.pp_size > 1
        # With one process DDP's reducer has nothing to add up, but would still copy every gradient.
        wrapped = getattr(model, "module", None)
        self._alone = isinstance(wrapped, DistributedDataParallel) and dist.get_world_size() == 1
        self._batch_keys: set[str] = (
            set()
        )  # of the current pipelined batch, those the model does not take
        self.packing = packing
        self.temperature = 1.0  # log-probs at labels are those of log_softmax(logits / temperature)
        self._install_head()
        if self.pipelined:
            self.module.register_forward_pre_hook(self._take_out_batch_keys, with_kwargs=True)

    def _install_head(self) -> None:
        scalar = hasattr(self.module, "backbone")
        reason = None if scalar else head_unsupported(self.module.config)
        if reason:
            logger.warning_once(
                f"{reason}: its full logits are formed, which takes more memory than the library's "
                "own head."
            )
        embedding = self.module.get_output_embeddings()
        if hasattr(embedding, "gather_output"):
            embedding.gather_output = True  # shardformer/policies/qwen2.py:427 leaves it split
        agree = self._largest if self.mesh.sharded_forward else None
        self.head = None if reason else Head.install(self.module, agree_on_chunks=agree)

    def _largest(self, count: int) -> int:
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def train_step(
        self,
        window: list[Batch],
        hooks: Objective,
        stop: bool = False,
        *,
        weight: float = 1.0,
        also: Sequence[LossPart] = (),
    ) -> Step:
        """Forward and backward over the micro-batches of ``window``, then one update.

        ``stop``: this rank wants the run to end after the step; all ranks learn of it in
        :attr:`Step.stop`. ``also``: further parts of the same step's loss, each of its own window;
        ``weight`` is that of ``window``.

        Each part is divided by its window's true count over all data-parallel ranks, so neither the
        split into micro-batches nor the number of ranks changes it.

        Raises:
            NonFiniteLoss: on every rank, before the update.
        """
        parts = [
            replace(p, window=self._prepared(p.window, p.hooks))
            for p in (LossPart(window, hooks, weight), *also)
        ]
        num_terms = [sum(part.hooks.num_terms(batch) for batch in part.window) for part in parts]
        tokens = sum(batch["attention_mask"].sum() for part in parts for batch in part.window)
        *counts, tokens, stops = (
            int(n)
            for n in self._sum([*(n * self.mesh.is_loss_rank for n in (*num_terms, tokens)), stop])
        )
        self.model.train()
        totals, metrics = [], {}
        for part, count in zip(parts, counts, strict=True):
            scale = part.weight * self.mesh.dp_size / max(count, 1)
            total, samples = self._run(part.window, part.hooks, scale, sync=part is parts[-1])
            totals.append(total * self.mesh.is_loss_rank)
            for name, values in samples.items():
                metrics.setdefault(name, []).extend(values)
        losses = [
            total / max(count, 1) for total, count in zip(self._sum(totals), counts, strict=True)
        ]
        if not all(map(math.isfinite, losses)):
            self.optimizer.zero_grad()
            raise NonFiniteLoss(
                "the loss of this step is "
                f"{next(loss for loss in losses if not math.isfinite(loss))}"
            )
        return Step(losses[0], counts[0], tokens, stops > 0, self._update(), metrics, losses[1:])

    def _prepared(self, window: list[Batch], hooks: Objective) -> list[Batch]:
        window = [self._to_device(hooks.prepare(batch)) for batch in window]
        if not hasattr(hooks, "prepare_window"):
            return window
        self.model.eval()
        with torch.no_grad():
            return hooks.prepare_window(window)

    @torch.no_grad()
    def collect(self, batch: Batch, hooks: Objective) -> dict[str, Tensor]:
        """The metrics that ``hooks.loss`` makes of ``batch``, (n,) each in the order of the rows,
        and nothing else: no gradient, no exchange of losses. Under a pipeline they are on its last
        stage; the other stages get none."""
        self.model.eval()
        _, metrics = self._run([self._to_device(batch)], hooks, None)
        return {name: torch.cat(values).to(self.device) for name, values in metrics.items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], hooks: Objective) -> Step:
        """Loss per unit and metrics over ``batches``, the samples of all ranks; every rank must
        pass equally many."""
        self.model.eval()
        total, num_terms = 0.0, 0.0
        metrics: dict[str, list[Tensor]] = {}
        for batch in batches:
            batch = self._to_device(hooks.prepare(batch))
            batch_total, samples = self._run([batch], hooks, None)
            total += float(batch_total)
            num_terms += float(hooks.num_terms(batch))
            for name, values in samples.items():
                metrics.setdefault(name, []).extend(values)
        loss, count = self._sum(
            [total * self.mesh.is_loss_rank, num_terms * self.mesh.is_loss_rank]
        )
        everyone = all_gather_object(metrics if self.mesh.is_loss_rank else {})
        whole = {
            name: [t for rank in everyone for t in rank.get(name, [])]
            for name in dict.fromkeys(chain(*everyone))
        }
        return Step(loss / max(count, 1), int(count), metrics=whole)

    def forward(self, batch: Batch, model_keys: tuple[str, ...]) -> Any:
        """The model's outputs; ``outputs.logits`` are the (1, n) log-probs that ``batch["labels"]``
        chose."""
        keys = (*model_keys, *PACK_KEYS)
        inputs = self._choose(batch, {key: batch[key] for key in keys if key in batch})
        try:
            outputs = self.model(**inputs, use_cache=False)
        finally:
            self._clear_head()
        return self._read(outputs, batch)

    def _run(
        self, window: list[Batch], hooks: Objective, scale: float | None, sync: bool = True
    ) -> tuple[Tensor, dict]:
        """Sum of the loss's terms, and samples; with ``scale`` the gradients too, added up over
        ranks if ``sync``."""
        usual = self.temperature
        self.temperature = getattr(hooks, "temperature", usual)
        try:
            if self.pipelined:
                return self._pipeline_window(window, hooks, scale)
            return self._plain_window(window, hooks, scale, sync)
        finally:
            self.temperature = usual

    def _plain_window(
        self, window: list[Batch], hooks: Objective, scale: float | None, sync: bool
    ) -> tuple[Tensor, dict]:
        total, metrics = torch.zeros((), dtype=torch.float64, device=self.device), {}
        for index, batch in enumerate(window):
            last = sync and index == len(window) - 1
            with nullcontext() if scale is None or (last and not self._alone) else self._no_sync():
                loss, samples = hooks.loss(self.forward(batch, hooks.model_keys), batch)
                if scale is not None:
                    self.booster.backward(loss * scale, self.optimizer)
            total += loss.detach()
            _collect(metrics, samples)
        return total, metrics

    def _no_sync(self):
        # ZeRO-2 and Gemini add up reduced gradients themselves; the others wait for the last
        # micro-batch.
        partitioned = getattr(self.optimizer, "_partition_grads", False)
        if partitioned or self.mesh.sharded_forward or not self.plugin.support_no_sync():
            return nullcontext()
        return self.booster.no_sync(self.model, self.optimizer)

    def _pipeline_window(
        self, window: list[Batch], hooks: Objective, scale: float | None
    ) -> tuple[Tensor, dict]:
        batch = concatenate(window)
        rows = len(batch["input_ids"])
        schedule = self._reset_schedule(rows)
        self._batch_keys = set(batch) - {*hooks.model_keys, *PACK_KEYS}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics: dict[str, list[Tensor]] = {}

        def criterion(outputs: Any, micro_batch: Batch) -> Tensor:
            self._clear_head()
            loss, samples = hooks.loss(self._read(outputs, micro_batch), micro_batch)
            total.add_(loss.detach())
            _collect(metrics, samples)
            # The schedule divides by the number of micro-batches (one_f_one_b.py:272); the window's
            # count is ours.
            return loss * (1.0 if scale is None else scale) * schedule.num_microbatches

        with self.model.no_sync() if scale is None else nullcontext():
            self.booster.execute_pipeline(
                iter([batch]),
                self.model,
                criterion,
                self.optimizer if scale is not None else None,
                return_loss=False,
            )
        self._clear_head()
        return total, metrics

    def _reset_schedule(self, rows: int):
        # Evaluation between training steps, and steps of another size, leave the schedule with the
        # old sizes.
        schedule, size = self.plugin.scheduler, min(self.options.microbatch_size, rows)
        schedule.last_batch_size, schedule.microbatch_size = None, size
        schedule.num_microbatches = max(1, rows // size)
        return schedule

    def _take_out_batch_keys(self, module: nn.Module, args: tuple, kwargs: dict):
        """Before each micro-batch's forward: labels go to the head, what the model does not take
        goes nowhere."""
        if self.mesh.last_stage:
            self._set_head(kwargs)
        inputs = {key: value for key, value in kwargs.items() if key not in self._batch_keys}
        return args, with_block_mask(inputs, self.dtype)

    def _choose(self, batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Set the head to the batch's labels; returns what the model is called with: ``inputs``, or
        these packed."""
        packed = (
            self.packing.pack(batch)
            if self.packing and self.head and set(inputs) <= PACKABLE
            else None
        )
        if packed is None:
            self._set_head(batch)
            return with_block_mask(inputs, self.dtype)
        if "labels" in batch:
            self.head.set_targets(packed.targets)
            self.head.temperature = self.temperature
        return packed.inputs

    def _set_head(self, batch: Batch) -> None:
        if self.head is not None and "labels" in batch:
            self.head.set(batch["labels"])
            self.head.temperature = self.temperature

    def _clear_head(self) -> None:
        if self.head is not None:
            self.head.clear()

    def _read(self, outputs: Any, batch: Batch) -> Any:
        if self.head is None and "labels" in batch:
            # Gemini returns ColoTensors, whose in-place operations change nothing
            # (tensor/colo_tensor.py:6).
            logits = outputs["logits"].as_subclass(Tensor)
            outputs["logits"] = logprobs_from_logits(
                logits, batch["labels"], temperature=self.temperature
            )
        return outputs

    def _update(self) -> float | None:
        scale = self._loss_scale()
        if hasattr(self.optimizer, "_current_grad_norm"):
            self.optimizer._current_grad_norm = None
        self.optimizer.step()
        try:
            norm = self.optimizer.get_grad_norm()
        except (
            NotImplementedError
        ):  # an optimizer that the caller boosted with plain DDP keeps no norm
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
        """True on every rank when ``flag`` is true on each."""
        return self._sum([not flag])[0] == 0

    def sum_of_shares(self, values: list[Tensor | float]) -> list[float]:
        """Sums over the data-parallel shares, of numbers that all processes of a share have
        alike."""
        return self._sum([value * self.mesh.is_loss_rank for value in values])

    def _sum(self, values: list[Tensor | float]) -> list[float]:
        """Sums over all ranks; what only reporting ranks hold is multiplied by ``mesh.reports``
        before."""
        box = torch.tensor(
            [float(value) for value in values], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(box)
        return box.tolist()


def grad_scaler(optimizer):
    """ColossalAI's dynamic gradient scaler of an fp16 optimizer, or None."""
    for name in ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision"):
        scaler = getattr(getattr(optimizer, name, None), "grad_scaler", None)
        if scaler is not None:
            return scaler
    return None


def _collect(metrics: dict[str, list[Tensor]], samples: dict[str, Tensor]) -> None:
    for name, values in samples.items():
        metrics.setdefault(name, []).append(values.detach().float().reshape(-1).cpu())
