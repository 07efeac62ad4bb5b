"""What trainers ask of an engine besides steps."""

from types import SimpleNamespace

import torch

from coati.parallel.footprint.model_flops import PassFlops
from coati.parallel.options import ParallelOptions
from coati.parallel.step_work import PassWork, StepClock


class FakeEngine:
    """Of one process, on a CPU, whose passes take 2 and 6 FLOPs a token."""

    lr_scheduler = None
    device = "cpu"
    plugin = None
    booster = None
    dtype = torch.float32
    mesh = SimpleNamespace(is_loss_rank=True)
    options = ParallelOptions()

    def __init__(self) -> None:
        self.work = PassWork(PassFlops(2.0, 0.0, 0.0), PassFlops(6.0, 0.0, 0.0))
        self.clock = StepClock()
