"""Collectives without a process group are the identity, and with one what their names say."""

import torch

from coati.utils import distributed
from tests.distributed.spawn import run


def test_alone_everything_is_the_identity(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    values = torch.tensor([1.0, 2.0])
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.is_rank_0()
    assert distributed.all_reduce_sum(values) is values and distributed.all_reduce_mean(
        values
    ).tolist() == [1.0, 2.0]
    assert distributed.all_gather_object("a") == ["a"] and distributed.broadcast_object([1]) == [1]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    distributed.barrier()
    distributed.print_rank_0("said")
    assert capsys.readouterr().out == "said\n"


def test_before_the_group_is_there_the_launcher_knows_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    distributed.print_rank_0("not said")
    assert distributed.rank() == 3 and capsys.readouterr().out == ""


def exchange() -> list:
    """In a worker: one call of each."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = distributed.rank()
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    return [
        distributed.world_size(),
        distributed.all_reduce_sum(mine.clone()).tolist(),
        distributed.all_reduce_mean(mine.clone()).tolist(),
        distributed.all_gather_object({"rank": rank}),
        distributed.broadcast_object(f"from {rank}", source=1),
        [distributed.any_rank(rank == 1), distributed.any_rank(False)],
    ]


def test_two_ranks_hear_the_same():
    expected = [2, [3.0, 30.0], [1.5, 15.0], [{"rank": 0}, {"rank": 1}], "from 1", [True, False]]
    assert run(2, "tests.utils.test_distributed:exchange") == [expected, expected]
