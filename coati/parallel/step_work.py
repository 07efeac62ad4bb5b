"""What a model's passes need and take: FLOPs by mathematics, and the time of the parts of a step,
neither of which makes the host wait for a GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coati.models.ilql_heads import heads_of
from coati.models.logprobs import IGNORE_INDEX
from coati.parallel.footprint.model_flops import (
    Adapters,
    PassFlops,
    Windows,
    forward_flops,
    training_flops,
)
from coati.parallel.footprint.model_shape import ModelShape

DRAINED = 256  # open spans on a GPU from which on finished ones are summed


class PassWork:
    """FLOPs of a model's passes since :meth:`take`, summed on its device.

    ``unknown``: why there is no formula for the model; "" where there is one.
    """

    def __init__(self, forward: PassFlops, training: PassFlops, window: int = 0) -> None:
        self.forward = forward
        self.training = training
        self.window = window
        self.unknown = ""
        self.flops: Any = 0.0

    @classmethod
    def of(cls, module: nn.Module, scalar: bool) -> "PassWork":
        """Of a model, its adapters and its heads. ``scalar``: it has no vocabulary head."""
        try:
            config = module.config.to_dict()
            shape = ModelShape.of(config)
        except (AttributeError, ValueError) as error:
            work = cls(PassFlops(0.0, 0.0, 0.0), PassFlops(0.0, 0.0, 0.0))
            work.unknown = str(error).split(". ")[0] or "a model without a configuration"
            return work
        windows = Windows.of(config)
        adapters = adapters_of(module)
        values = not scalar and heads_of(module) is not None
        return cls(
            forward_flops(shape, scalar, windows),
            training_flops(shape, scalar, windows, adapters, values),
            windows.length if windows.layers else 0,
        )

    @torch.no_grad()
    def add_batch(
        self, batch: dict[str, Tensor], trained: bool, shared: Tensor | None = None
    ) -> None:
        """A pass over the rows of ``batch``: ``input_ids`` (B, S), and ``attention_mask``,
        ``labels`` and ``position_ids`` where it has them. ``shared`` (1, P): the positions of the
        tokens that go through the model, where rows share some."""
        mask = batch.get("attention_mask")
        real = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
        places = batch.get("position_ids")
        seen = (real.cumsum(1) if places is None else places + 1).masked_fill(~real, 0)
        tokens: Any = real.sum().double()
        if shared is not None:
            seen = shared + 1
            tokens = shared.numel()
        targets: Any = 0.0
        if "labels" in batch:
            targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().double()
        costs = self.training if trained else self.forward
        windowed = seen.clamp(max=self.window).sum().double() if self.window else 0.0
        self.flops = self.flops + costs.of(tokens, targets, seen.sum().double(), windowed)

    @torch.no_grad()
    def add_generation(self, prompt_ids: Tensor, prompt_mask: Tensor, lengths: Tensor) -> None:
        """Responses of ``lengths`` (B,) tokens to the prompts (B, P), padded on the left. A prompt
        that is that of the row before needs to be read once."""
        prompts = prompt_mask.sum(1).double()
        repeated = torch.zeros_like(prompts, dtype=torch.bool)
        repeated[1:] = (prompt_ids[1:] == prompt_ids[:-1]).all(1)
        repeated[1:] &= (prompt_mask[1:] == prompt_mask[:-1]).all(1)
        # The last token of a response is not read.
        rows = prompts + lengths.to(prompts.device).double() - 1
        read_before = prompts * repeated
        pairs = _pairs(rows) - _pairs(read_before)
        windowed: Any = 0.0
        if self.window:
            limit = float(self.window)
            windowed = (_pairs(rows, limit) - _pairs(read_before, limit)).sum()
        tokens = (rows - read_before).sum()
        found = self.forward.of(tokens, lengths.sum().double(), pairs.sum(), windowed)
        self.flops = self.flops + found

    def take(self) -> Any:
        """FLOPs since this was last called, a number or an fp64 scalar on the device."""
        found = self.flops
        self.flops = 0.0
        return found


def _pairs(lengths: Tensor, window: float | None = None) -> Tensor:
    """Pairs of a token and one that it sees, in rows of ``lengths``."""
    if window is None:
        return lengths * (lengths + 1) / 2
    inside = lengths.clamp(max=window)
    return inside * (inside + 1) / 2 + (lengths - inside) * window


def adapters_of(module: nn.Module) -> Adapters | None:
    """The LoRA adapters of a model that peft has changed; None of another."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    config = next(iter(configs.values()))
    named = getattr(config, "target_modules", None)
    targets = None if named is None or isinstance(named, str) else frozenset(named)
    return Adapters(getattr(config, "r", 0), targets)


class StepClock:
    """Seconds of the parts of a step by name: on the host, and of what runs on a GPU between events
    of its stream, read when they are over."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self.running = True
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count what is done inside as ``part``, unless :attr:`running` is False."""
        if not self.running:
            yield
            return
        began = self._mark()
        try:
            yield
        finally:
            ended = self._mark()
            if self._on_gpu:
                self._open.append((part, began, ended))
                if len(self._open) >= DRAINED:
                    self._drain()
            else:
                self.add(part, ended - began)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside counts for nothing."""
        before = self.running
        self.running = False
        try:
            yield
        finally:
            self.running = before

    def add(self, part: str, seconds: float) -> None:
        """Count ``seconds`` as ``part``."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def _drain(self) -> None:
        left = []
        for span in self._open:
            part, began, ended = span
            if ended.query():
                self.add(part, began.elapsed_time(ended) / 1000)
            else:
                left.append(span)
        self._open = left

    def take(self) -> dict[str, float]:
        """Seconds by part since this was last called; what a GPU has not finished comes later."""
        self._drain()
        found = self.seconds
        self.seconds = {}
        return found
