"""What ranks compare before training, and the directory that they must share: a thread for each
rank, one store."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from coati.parallel import agreement, shared_folder
from coati.parallel.agreement import UNKNOWN, Exchange, RanksDiffer, agree, verdict
from coati.parallel.no_store import in_time
from coati.parallel.shared_folder import check_shared
from tests.distributed.spawn import run

WHY = "each process writes its part of a checkpoint there"


def together(*works) -> list:
    """``works[rank](meeting)`` of all ranks at once, two on each host; what each returns or
    raises."""
    store = dist.HashStore()

    def one(rank: int):
        try:
            return works[rank](Exchange(store, rank, len(works), f"node{rank // 2 + 1}"))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, range(len(works))))


def tell(**facts):
    return lambda met: agree(lambda found: found, lambda: facts, met)


def test_equal_ranks_go_on_with_what_they_have_worked_out():
    found = together(*[tell(lr=1e-5, rows=7)] * 3)
    assert found == [{"lr": 1e-5, "rows": 7}] * 3


def test_every_difference_is_named_on_every_rank_with_host_ranks_and_values():
    here = {"--lr": 1e-5, "--seed": 1, "torch": "2.14.1"}
    there = {"--lr": 2e-5, "--seed": 1, "torch": "2.5.1"}
    found = together(tell(**here), tell(**here), tell(**there), tell(**there))
    assert {type(one) for one in found} == {RanksDiffer}
    (text,) = {str(one) for one in found}
    assert text == (
        "the processes of this run differ: --lr is 1e-05 on node1 (ranks 0 and 1), 2e-05 on node2 "
        "(ranks 2 and 3); torch is 2.14.1 on node1 (ranks 0 and 1), 2.5.1 on node2 (ranks 2 and "
        "3). Each would train something else; start all of them with the same flags, files and "
        "packages"
    )


def test_what_one_rank_alone_is_given_is_a_difference():
    answers = [{"host": "node1", "facts": {"b": "2"}}, {"host": "node2", "facts": {}}]
    assert "b is 2 on node1 (rank 0), not given on node2 (rank 1)" in verdict(answers, "")


def test_one_rank_of_a_host_speaks_for_it_and_what_is_unknown_is_not_compared():
    leader = {"weights": "abc", "commit": UNKNOWN}
    other = {"weights": "abc", "commit": "123"}
    found = together(tell(**leader), tell(weights=None), tell(**other), tell(weights=None))
    assert not [one for one in found if isinstance(one, Exception)]
    bad = together(tell(**leader), tell(weights=None), tell(weights="xyz"), tell(weights=None))
    assert "weights is abc on node1 (rank 0), xyz on node2 (rank 2)" in str(bad[1])


def test_a_failure_of_one_rank_is_every_ranks_and_its_own_as_it_was():
    def fail(met):
        def work():
            raise ValueError("--mixed_precision bf16: no bf16 here")

        return agree(lambda found: found, work, met)

    first, second, third = together(tell(a=1), tell(a=1), fail)
    assert type(third) is ValueError and str(third) == "--mixed_precision bf16: no bf16 here"
    for one in (first, second):
        assert type(one) is RanksDiffer
        assert str(one) == "rank 2 on node2: --mixed_precision bf16: no bf16 here"


def test_a_rank_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE_S", 0.3)
    monkeypatch.setattr(agreement, "LEAVE_S", 0.3)
    first, second, _ = together(tell(a=1), tell(a=1), lambda met: None)
    assert "rank 2 did not answer within 0 s" in str(first) and str(first) == str(second)


def test_rank_0_does_not_take_the_store_away_before_all_have_heard(monkeypatch):
    """It leaves last, whatever the others do meanwhile."""
    left = []
    plain = Exchange.leave_together

    def slowly(self, key):
        if self.rank == 1:
            threading.Event().wait(0.5)
            left.append(1)
        plain(self, key)
        if self.rank == 0:
            left.append(0)

    monkeypatch.setattr(Exchange, "leave_together", slowly)
    together(tell(a=1), tell(a=2))
    assert left == [1, 0]


def test_a_long_value_is_shown_where_it_differs():
    long = "x" * 500
    answers = [{"host": f"node{i}", "facts": {"a": long + str(i)}} for i in (1, 2)]
    text = verdict(answers, "")
    assert "xxx1 on node1" in text and "xxx2 on node2" in text and len(text) < 500


# ---- the directory


def share(folder: Path, **keywords):
    return lambda met: check_shared("--save_dir", folder, WHY, met=met, **keywords)


def test_a_shared_directory_is_left_as_it_was(tmp_path):
    assert together(*[share(tmp_path / "a" / "run")] * 3) == [None] * 3
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").touch()
    assert together(*[share(tmp_path / "run")] * 3) == [None] * 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_directory_of_each_host_is_refused_with_both_names(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "PATIENCE_S", 0.3)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = share(tmp_path / "one" / "run")
    second = share(tmp_path / "two" / "run")
    found = together(first, first, second, second)
    (text,) = {str(one) for one in found}
    assert text.startswith(
        f"--save_dir {tmp_path}/one/run is not the same directory on all hosts: node2 (rank 2) "
        f"does not see what node1 (rank 0) writes there; {WHY}"
    )
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "one", tmp_path / "two"]


def test_a_file_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    """As over NFS, whose clients learn of it after seconds."""
    monkeypatch.setattr(shared_folder, "PATIENCE_S", 5.0)
    file = tmp_path / "late"
    threading.Timer(0.4, lambda: file.write_text("token")).start()
    assert shared_folder._appears(file, "token")


def test_what_one_rank_writes_must_reach_rank_0(tmp_path, monkeypatch):
    """A host that reads the directory and whose own writing goes elsewhere."""
    monkeypatch.setattr(shared_folder, "PATIENCE_S", 0.3)
    plain = Path.write_text

    def write(self, text, **keywords):
        return plain(self if self.name != "2" else tmp_path / "elsewhere", text, **keywords)

    monkeypatch.setattr(Path, "write_text", write)
    found = together(*[share(tmp_path / "run")] * 3)
    assert "node2 (rank 2) does not see" in str(found[0]) and not (tmp_path / "run").exists()


def test_a_rank_that_cannot_write_is_named(tmp_path, monkeypatch):
    plain = Path.write_text

    def write(self, text, **keywords):
        if self.name == "1":
            raise OSError(30, "Read-only file system")
        return plain(self, text, **keywords)

    monkeypatch.setattr(Path, "write_text", write)
    found = together(*[share(tmp_path / "run")] * 2)
    expected = f"--save_dir {tmp_path}/run: node1 (rank 1) cannot write there (Read-only file"
    assert str(found[0]).startswith(expected) and str(found[1]) == str(found[0])


def test_a_dry_run_tries_the_nearest_directory_that_is_there(tmp_path):
    assert together(*[share(tmp_path / "a" / "b", create=False)] * 2) == [None, None]
    assert not list(tmp_path.iterdir())


# ---- real processes


def joined() -> str:
    """In a worker: what is said when the two do not fit."""
    from coati.parallel.launch import launch, shut_down
    from coati.utils.errors import RunFailed

    try:
        launch()
    except RunFailed as error:
        return str(error)
    shut_down()
    return "joined"


def differing() -> str:
    os.environ["NCCL_ALGO"] = f"algo{os.environ['RANK']}"
    return joined()


def test_variables_that_differ_are_refused_before_the_group_is_made():
    said = run(2, "tests.parallel.test_agreement:differing", env={"CUDA_VISIBLE_DEVICES": ""})
    assert said[0] == said[1]
    assert "NCCL_ALGO is algo0 on " in said[0] and "the same checkout" in said[0]


def occupied() -> str:
    """In a worker: another program has the port."""
    import socket

    if os.environ["RANK"] == "0":
        blocker = socket.socket()
        blocker.bind(("", int(os.environ["MASTER_PORT"])))
        blocker.listen()
    return joined()


def test_a_port_in_use_is_one_message_with_who_has_it():
    env = {"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "1"}
    (said,) = run(1, "tests.parallel.test_agreement:occupied", env=env)
    assert said.startswith("rank 0: port ") and " is in use by process " in said
    assert "--master_port" in said


def test_a_store_that_cannot_listen_is_a_network_error_whatever_torch_calls_it():
    def connect() -> None:
        raise RuntimeError("The server socket has failed to listen ... EADDRINUSE")

    with pytest.raises(dist.DistNetworkError, match="EADDRINUSE"):
        in_time(connect, 5)
