"""What a plugin is told beside its own keywords."""

import inspect

import pytest
from torch.nn.parallel import DistributedDataParallel

from coati.parallel import boost
from coati.parallel.options import ParallelOptions


class Plugin:
    def __init__(self, **keywords) -> None:
        self.ddp_kwargs = {"broadcast_buffers": True}


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_are_sent_where_there_is_somebody_to_take_them(monkeypatch, processes):
    boost.prepare_colossalai()
    from colossalai.booster import plugin as upstream

    monkeypatch.setattr(upstream, "TorchDDPPlugin", Plugin)
    monkeypatch.setattr(boost, "world_size", lambda: processes)
    made = boost.make_plugin(ParallelOptions(plugin="ddp"))
    known = "init_sync" in inspect.signature(DistributedDataParallel).parameters
    alone = {"init_sync": False} if processes == 1 and known else {}
    assert made.ddp_kwargs == {"broadcast_buffers": True} | alone
