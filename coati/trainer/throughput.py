"""How near a run comes to what its devices can do: model FLOP/s, their share of the peak (MFU), the
time of the parts of a step, and peak memory, under the names in docs/run_report.md."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from coati.parallel.engine import Engine
from coati.parallel.step_work import PassWork, StepClock
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger
from coati.utils.memory import peak_memory_mb
from coati.utils.meter import AccumulativeMeanMeter
from coati.utils.peak_rates import peak_rate

logger = get_logger(__name__)

FLOPS = "_flops"  # in the meter: of each second of each process
TOKENS = "tokens_per_second"
TFLOPS = "model_tflops_per_second"
MFU = "mfu"
PEAK = "peak_memory_mb"


class Throughput:
    """Collects what the engines of a run count, and gives it to the meter.

    Args:
        trained: the engine that is trained; its place in the mesh decides whose FLOPs count once.
        others: further engines whose passes are part of a step: critic, reference, reward model,
            teacher.
        clocks: further clocks of parts of a step.
        rate: what ``tokens_per_second`` counts, in words.
    """

    def __init__(
        self,
        trained: Engine,
        others: Sequence[Engine] = (),
        clocks: Sequence[StepClock] = (),
        rate: str = "tokens/s",
    ) -> None:
        engines = {id(engine): engine for engine in (trained, *others)}.values()
        self.counts = trained.mesh.is_loss_rank
        self.device = torch.device(trained.device)
        self.precision = precision_of(trained)
        self.clock = StepClock()  # of the host, for what the trainer does between steps
        self._works: list[PassWork] = [engine.work for engine in engines]
        self._clocks = [self.clock, *(engine.clock for engine in engines), *clocks]
        self._rate = rate
        self._peak: float | None = None
        self._parts: dict[str, None] = {}  # those seen so far, in their order
        self._seconds = 0.0
        self._steps = 0
        self._logged: dict[str, tuple[float, float]] = {}  # sum and seconds, of the whole run

    def prepare(self) -> None:
        """Before the first step: the device's peak rate; what is not known is said once. What has
        been computed until then, reference log-probs of all rows say, counts for nothing."""
        self._take()
        if unknown := next((work.unknown for work in self._works if work.unknown), ""):
            logger.info(f"no model FLOP/s and no MFU are logged: {unknown}")
            return
        self._peak = peak_rate(self.device, self.precision)
        if self._peak is None:
            name = torch.cuda.get_device_name(self.device)
            logger.info(
                f"no MFU is logged: the peak rate of {name} in {self.precision} is not known "
                "(coati/utils/peak_rates.py has those that are); model FLOP/s are"
            )

    def count(self, seconds: float, steps: int = 0) -> None:
        """``seconds`` of training; ``steps`` (or episodes) are done with them."""
        self._seconds += seconds
        self._steps += steps

    def _take(self) -> tuple[Any, dict[str, float]]:
        """FLOPs, and seconds by part, since the last call."""
        flops: Any = sum(work.take() for work in self._works)
        seconds: dict[str, float] = {}
        for clock in self._clocks:
            for part, value in clock.take().items():
                seconds[part] = seconds.get(part, 0.0) + value
        return flops, seconds

    def add_to(self, meter: AccumulativeMeanMeter) -> None:
        """Give ``meter`` what was counted since the last call; nothing waits for a device."""
        flops, seconds = self._take()
        if not any(work.unknown for work in self._works):
            mine = flops if self.counts else 0.0
            meter.add_ratio(FLOPS, mine, self._seconds)
            if self._peak is not None:
                meter.add_ratio(MFU, mine, self._seconds * self._peak)
        self._parts |= dict.fromkeys(seconds)
        for part in self._parts:
            meter.add_ratio(f"seconds_{part}", seconds.get(part, 0.0), self._steps)
        meter.add_largest(PEAK, peak_memory_mb())
        self._seconds = 0.0
        self._steps = 0

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """``means``, as the meter reports them, with what follows from several processes."""
        found = dict(means)
        if FLOPS in found:
            found[TFLOPS] = found.pop(FLOPS) * world_size() / 1e12
        return found

    def logged(
        self, metrics: dict[str, float], seconds: float, of_tokens: float | None = None
    ) -> None:
        """Remember what was logged of ``seconds`` of training, for :meth:`summary`; ``of_tokens``:
        those that tokens per second are of, where they are not all."""
        weights = {TOKENS: seconds if of_tokens is None else of_tokens}
        for name in (TOKENS, TFLOPS, MFU):
            if name in metrics:
                weight = weights.get(name, seconds)
                total, before = self._logged.get(name, (0.0, 0.0))
                self._logged[name] = (total + metrics[name] * weight, before + weight)

    def summary(self) -> str:
        """One line about the whole run, since it was started or resumed; "" where nothing was
        logged."""
        means = {
            name: total / max(seconds, 1e-9) for name, (total, seconds) in self._logged.items()
        }
        parts = [f"{means[TOKENS]:,.0f} {self._rate}"] if TOKENS in means else []
        if TFLOPS in means:
            parts.append(f"{means[TFLOPS]:.3g} model TFLOP/s")
        if MFU in means:
            own = "measured matrix rate" if self.device.type == "cpu" else "peak"
            parts.append(f"MFU {means[MFU]:.1%} of the {own} in {self.precision}")
        return f"mean speed: {', '.join(parts)}" if parts else ""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed inside, in an evaluation say, counts for nothing."""
        flops = [work.flops for work in self._works]
        try:
            with ExitStack() as stack:
                for clock in self._clocks:
                    stack.enter_context(clock.paused())
                yield
        finally:
            for work, before in zip(self._works, flops, strict=True):
                work.flops = before


def precision_of(engine: Engine) -> str:
    """In which the model of ``engine`` computes: "fp32", "bf16" or "fp16". Of one that the caller
    boosted the plugin or the booster knows, each plugin in its own way."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    if named := getattr(engine.plugin, "precision", None):
        return str(named)
    if config := getattr(engine.plugin, "gemini_config", None):
        return names.get(config["mixed_precision"], "fp32")
    mixed = type(getattr(engine.booster, "mixed_precision", None)).__name__
    for name in names.values():
        if mixed.startswith(name.upper()):
            return name
    return names.get(engine.dtype) or str(engine.options.precision or "fp32")
