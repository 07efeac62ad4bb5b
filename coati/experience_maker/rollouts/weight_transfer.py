"""Weights from rank 0's process to a sampler's without a file: broadcast in a process group of
their own (NCCL between GPUs, gloo on CPUs), or in memory that both map (CUDA IPC on one GPU, shared
memory on a CPU). Imports torch only: samplers receive in environments of their own.

Each transfer has a group, or handles, of its own, so that one that fails leaves nothing behind.
"""

import base64
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BROADCAST = "broadcast"
SHARED = "shared"
SHARED_MEMORY = "/dev/shm"
PAUSE_S = 0.05  # see coati/parallel/leave_groups.py
LOOK_S = 0.01

_last: list[Any] = []  # the group of the last transfer, destroyed with the next one


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _facts(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    return [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()]


class Sending:
    """Weights on their way to one server. ``described``: what its workers need to receive them, as
    JSON can hold it. ``failure``: why they could not be sent, where that is known."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.described = described
        self.failure: str | None = None

    @property
    def is_going_on(self) -> bool:
        """Whether something of it is left to be ended."""
        return False

    def end(self) -> None:
        """The server has them, or has failed."""

    def close(self) -> None:
        """Nothing is sent any more when this returns."""
        self.end()


class Broadcast(Sending):
    """``tensors`` to the ``workers`` of a server, which reach this host at ``host``, from a thread
    that gives up after ``timeout`` seconds. It must have ended before the process does: one that
    comes back from torch into a Python that is going down aborts it (:meth:`close`)."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        host: str,
        workers: int,
        device: torch.device,
        timeout: float,
    ) -> None:
        self._wait = timedelta(seconds=timeout)
        self._store = dist.TCPStore(
            host, 0, workers + 1, is_master=True, timeout=self._wait, wait_for_workers=False
        )
        super().__init__(
            {
                "kind": BROADCAST,
                "host": host,
                "port": self._store.port,
                # Who does not know it cannot join.
                "key": secrets.token_urlsafe(16),
                "workers": workers,
                "backend": "nccl" if device.type == "cuda" else "gloo",
                "timeout": timeout,
                "tensors": _facts(tensors),
            }
        )
        self._closed = Event()
        self._thread = Thread(target=self._send, args=(tensors, device), daemon=True)
        self._thread.start()

    @property
    def is_going_on(self) -> bool:
        return self._thread.is_alive()

    def _all_there(self) -> bool:
        """Wait for all workers, in steps that :meth:`close` can end. False where it did. Raises
        RuntimeError after the time limit."""
        store = dist.PrefixStore(self.described["key"], self._store)
        here = [_here(worker) for worker in range(self.described["workers"])]
        end = time.monotonic() + self.described["timeout"]
        while not store.check(here):
            if self._closed.wait(LOOK_S):
                return False
            if time.monotonic() > end:
                raise RuntimeError("the server's workers have not come for them")
        return True

    def _send(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        try:
            if not self._all_there():
                return
            group = _group(self._store, self.described, 0)
            for tensor in tensors.values():
                _broadcast(group, tensor.detach().to(device).contiguous())
            _put_away(group)
        except (RuntimeError, dist.DistError) as error:
            self.failure = " ".join(str(error).split())[:300]

    def end(self) -> None:
        self._thread.join(PAUSE_S)  # one whose server has failed ends by its time limit

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def _here(worker: int) -> str:
    return f"here/{worker}"


def _group(store: Any, described: Mapping[str, Any], rank: int) -> Any:
    """A process group outside torch.distributed's default one, which training may have."""
    wait = timedelta(seconds=described["timeout"])
    store = dist.PrefixStore(described["key"], store)
    size = described["workers"] + 1
    if described["backend"] == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, wait)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = wait
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _broadcast(group: Any, tensor: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def _put_away(group: Any) -> None:
    """Nothing is destroyed at the moment at which its last collective has just ended."""
    time.sleep(PAUSE_S)
    _last[:] = [group]


def leave_last() -> None:
    """Destroy the group of the last transfer, which has ended."""
    time.sleep(PAUSE_S)
    _last.clear()


class Shared(Sending):
    """A copy of ``tensors`` in memory of this machine that a server's worker maps. Raises OSError
    where there is not room for it."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        if device.type == "cpu":
            _check_room(tensors)
        # They live until :meth:`end`.
        self._copies = {
            name: tensor.detach().to(device).contiguous().clone()
            for name, tensor in tensors.items()
        }
        give = _cuda_handle if device.type == "cuda" else _cpu_handle
        facts = _facts(tensors)
        handles = [give(tensor) for tensor in self._copies.values()]
        super().__init__(
            {
                "kind": SHARED,
                "card": _card(device),
                "tensors": [[*fact, held] for fact, held in zip(facts, handles, strict=True)],
            }
        )

    def end(self) -> None:
        self._copies.clear()


def _check_room(tensors: Mapping[str, Tensor]) -> None:
    """Writing beyond the end of shared memory kills a process without a word."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise OSError(
            f"{SHARED_MEMORY} has {free >> 20} MiB left, the weights are {needed >> 20} MiB; take "
            "--rollout_sync http or disk, or give the container more (--shm-size)"
        )


def _card(device: torch.device) -> str | None:
    """What tells one GPU from another in every process of a machine; None for a CPU."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _cpu_handle(tensor: Tensor) -> list[Any]:
    manager, handle, size = tensor.untyped_storage()._share_filename_cpu_()
    return [_text(manager), _text(handle), size]


def _from_cpu(dtype: str, shape: list[int], held: list[Any]) -> Tensor:
    manager, handle = (base64.b64decode(text) for text in held[:2])
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager, handle, held[2])
    flat = torch.empty(0, dtype=_dtype(dtype)).set_(storage)
    return flat[: torch.Size(shape).numel()].view(shape)


def _cuda_handle(tensor: Tensor) -> list[Any]:
    from torch.multiprocessing.reductions import reduce_tensor

    _, given = reduce_tensor(tensor)
    # size, offset of the tensor in its storage, then what CUDA knows the memory and the event by
    handle, size, offset, _, counter, counter_offset, event, wait = given[7:]
    texts = [_text(handle), size, offset, _text(counter), counter_offset, _text(event), wait]
    return [given[3], *texts]


def _from_cuda(dtype: str, shape: list[int], held: list[Any]) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    start, handle, size, offset, counter, counter_offset, event, wait = held
    stride = torch.empty(shape, device="meta").stride()
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(shape),
        stride,
        start,
        torch.UntypedStorage,
        _dtype(dtype),
        torch.cuda.current_device(),
        base64.b64decode(handle),
        size,
        offset,
        False,
        base64.b64decode(counter),
        counter_offset,
        base64.b64decode(event),
        wait,
    )


def receive(described: Mapping[str, Any], worker: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a :class:`Sending`, one after the other, in a server's ``worker``; to be
    copied before the server answers. Raises ValueError where they do not come."""
    try:
        if described["kind"] == SHARED:
            yield from _mapped(described)
        else:
            yield from _received(described, worker)
    except (RuntimeError, dist.DistError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights have not come from the trainer: {said}") from error


def _received(described: Mapping[str, Any], worker: int) -> Iterator[tuple[str, Tensor]]:
    backend = described["backend"]
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("--rollout_sync nccl goes from GPU to GPU, and this server has none")
    wait = timedelta(seconds=described["timeout"])
    size = described["workers"] + 1
    address = described["host"], described["port"]
    store = dist.TCPStore(*address, size, is_master=False, timeout=wait, wait_for_workers=False)
    dist.PrefixStore(described["key"], store).set(_here(worker), "")
    group = _group(store, described, 1 + worker)
    device = "cuda" if backend == "nccl" else "cpu"
    for name, dtype, shape in described["tensors"]:
        tensor = torch.empty(shape, dtype=_dtype(dtype), device=device)
        _broadcast(group, tensor)
        yield name, tensor
    _put_away(group)


def _mapped(described: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    card = described["card"]
    here = None
    if torch.cuda.is_available():
        here = _card(torch.device("cuda", torch.cuda.current_device()))
    if card is not None and card != here:
        raise ValueError(
            f"--rollout_sync ipc shares memory of one GPU: the trainer has GPU {card}, this server "
            f"{here or 'none'}; take nccl or http"
        )
    rebuild = _from_cpu if card is None else _from_cuda
    for name, dtype, shape, held in described["tensors"]:
        yield name, rebuild(dtype, shape, held)
