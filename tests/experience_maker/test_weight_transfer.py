"""Weights that go from one process to another without a file: what arrives, and what is said when
it does not."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from coati.experience_maker.rollouts import weight_store, weight_transfer
from coati.experience_maker.rollouts.weight_store import MemoryStore
from coati.experience_maker.rollouts.weight_transfer import Broadcast, Shared, receive
from tests.distributed.spawn import free_port

CPU = torch.device("cpu")
TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scale": torch.tensor(3.0),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def same(found) -> bool:
    return found.keys() == TENSORS.keys() and all(
        tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])
        for name, tensor in found.items()
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_all_workers_of_a_server_receive_what_is_broadcast(workers):
    sending = Broadcast(TENSORS, "127.0.0.1", workers, CPU, 20)
    with ThreadPoolExecutor(workers) as pool:
        each = [
            pool.submit(lambda n: dict(receive(sending.described, n)), n) for n in range(workers)
        ]
        assert all(same(one.result()) for one in each)
    sending.end()
    sending._thread.join(5)
    assert not sending._thread.is_alive()


def test_shared_memory_holds_a_copy_until_the_server_has_it():
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    sending = Shared(tensors, CPU)
    tensors["a.weight"].zero_()  # training goes on
    assert same(dict(receive(sending.described)))
    sending.end()
    assert not sending._copies


def test_a_worker_that_never_comes_is_waited_for_no_longer_than_the_time_limit():
    sending = Broadcast(TENSORS, "127.0.0.1", 1, CPU, 0.3)
    sending._thread.join(10)
    assert not sending._thread.is_alive()
    assert sending.failure


def test_a_store_that_is_closed_waits_for_no_worker_and_leaves_no_thread():
    """A thread that comes back from torch while Python goes down aborts the process."""
    store = MemoryStore("nccl", ["http://127.0.0.1:1"], CPU, 60)
    began = time.monotonic()
    with store.offered(store.put(1, TENSORS), "http://127.0.0.1:1", 1):
        (sending,) = store._sending
    store.close()
    assert not sending._thread.is_alive()
    with pytest.raises(OSError, match="the run is over"), store.offered(None, "", 1):
        pass
    assert time.monotonic() - began < 30
    with pytest.raises(ValueError, match="the weights have not come from the trainer"):
        list(receive(sending.described | {"timeout": 0.3}))


def test_what_could_not_be_sent_is_said_on_the_trainers_side(monkeypatch):
    def broken(group, tensor):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Broadcast, "_all_there", lambda _: True)
    monkeypatch.setattr(weight_transfer, "_group", lambda *_: None)
    monkeypatch.setattr(weight_transfer, "_broadcast", broken)
    store = MemoryStore("nccl", ["http://127.0.0.1:1"], CPU, 5)
    said = []
    monkeypatch.setattr(weight_store.logger, "warning", said.append)
    with store.offered(store.put(3, TENSORS), "http://127.0.0.1:1", 1):
        pass
    assert said == [
        "--rollout_sync nccl: the weights of step 3 could not be sent to http://127.0.0.1:1: "
        "CUDA out of memory"
    ]


def test_a_trainer_that_is_gone_is_said():
    described = Broadcast(TENSORS, "127.0.0.1", 1, CPU, 20).described
    with pytest.raises(ValueError, match="the weights have not come from the trainer"):
        list(receive(described | {"port": free_port(), "timeout": 0.3}))
    with pytest.raises(ValueError, match="the weights have not come from the trainer"):
        list(receive(described | {"key": "another", "timeout": 0.3}))


def test_memory_that_is_gone_is_said():
    sending = Shared(TENSORS, CPU)
    described = sending.described
    described["tensors"][0][3][1] = weight_transfer._text(b"/torch_0_0_0")
    with pytest.raises(ValueError, match="the weights have not come from the trainer"):
        list(receive(described))


def test_shared_memory_without_room_is_refused_before_it_is_written(monkeypatch):
    monkeypatch.setattr(weight_transfer.shutil, "disk_usage", lambda _: type("", (), {"free": 8}))
    with pytest.raises(OSError, match=r"/dev/shm has 0 MiB left.*--rollout_sync http or disk"):
        Shared(TENSORS, CPU)


def test_gpus_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    described = Shared(TENSORS, CPU).described | {"card": "GPU-1"}
    with pytest.raises(ValueError, match="the trainer has GPU GPU-1, this server none"):
        list(receive(described))
    described = Broadcast(TENSORS, "127.0.0.1", 1, CPU, 0.3).described | {"backend": "nccl"}
    with pytest.raises(ValueError, match="goes from GPU to GPU, and this server has none"):
        list(receive(described))


def test_cuda_handles_survive_json(monkeypatch):
    """Every argument that CUDA's own way of sharing takes comes back as it was."""
    import json

    from torch.multiprocessing import reductions

    tensor = torch.arange(6.0).view(2, 3)
    rest = (0, b"handle\xff", 24, 512, False, b"counter", 3, b"event", True)
    given = (torch.Tensor, tensor.shape, (3, 1), 7, torch.UntypedStorage, torch.float32, *rest)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _: (None, given))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    taken = []
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *words: taken.append(words))
    held = json.loads(json.dumps(weight_transfer._cuda_handle(tensor)))
    weight_transfer._from_cuda("float32", [2, 3], held)
    assert taken == [given]


def test_a_store_keeps_what_is_in_use():
    store = MemoryStore("nccl", ["http://127.0.0.1:1"], CPU, 5)
    first, second = store.put(1, TENSORS), store.put(2, TENSORS)
    assert first.published().name != store.put(1, TENSORS).published().name
    store.keep_only(lambda: [second])
    store._writer.submit(int).result(5)  # behind it
    assert list(store._tensors) == [second.published().name]
    digests = dict(second.published().digests)
    assert digests["a.bias"][1:] == ("bfloat16", 1)
    store.close()
    assert not store._tensors


def test_two_servers_are_sent_weights_at_once():
    store = MemoryStore("nccl", ["http://127.0.0.1:1", "http://127.0.0.1:2"], CPU, 20)
    weights = store.put(1, TENSORS)
    found = []

    def take(url):
        with store.offered(weights, url, 1) as place:
            found.append(dict(receive(place.transfer)))

    threads = [threading.Thread(target=take, args=(url,)) for url in store._hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2 and all(map(same, found))
