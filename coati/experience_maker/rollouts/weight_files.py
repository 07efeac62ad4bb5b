"""Published weights: safetensors files with an index that says what is in them, which samplers
elsewhere read from a directory or over HTTP; or which are sent to them. Imports torch and
safetensors only: samplers read it in environments of their own."""

import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker.rollouts.weight_transfer import receive

Digest = tuple[str, str, int]
INDEX = "index.json"
MAX_FILE = 1 << 30  # bytes: what a reader over HTTP holds at a time


@dataclass(frozen=True)
class Place:
    """Where a reader finds published weights.

    ``path``: their directory; or ``url``, under which rank 0 serves them to who sends ``token``; or
    ``transfer``: how they come without a file
    (:mod:`~coati.experience_maker.rollouts.weight_transfer`). ``name``: what the weights are called
    (:attr:`Published.name`).
    """

    name: str
    path: str | None = None
    url: str | None = None
    token: str | None = None
    transfer: dict[str, Any] | None = None

    def to_json(self) -> str:
        """One JSON object: routes pass on texts alone."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> "Place":
        """What :meth:`to_json` wrote. Raises ValueError for anything else."""
        try:
            place = cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"no place of published weights: {text[:200]!r}") from error
        ways = (place.path, place.url, place.transfer)
        if sum(way is not None for way in ways) != 1:
            raise ValueError(
                "published weights lie in a directory, lie behind a URL or are sent: name one"
            )
        return place


@dataclass(frozen=True)
class Published:
    """Weights of a version that lie in ``folder`` (None: in memory). ``name``: version and digest
    of all of them, so that two sets of one version do not pass for each other; ``digests``:
    (SHA-256, dtype, dimensions) of each tensor by name."""

    version: int
    name: str
    folder: Path | None
    digests: Mapping[str, Digest]


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, as vLLM's ``/weight_checker`` has it."""
    plain = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy()).hexdigest()


def digest_of(tensor: Tensor) -> Digest:
    """What :attr:`Published.digests` says of a tensor."""
    return digest(tensor), str(tensor.dtype).removeprefix("torch."), tensor.dim()


def weights_name(version: int, digests: Mapping[str, Digest]) -> str:
    """``7-3fe01c...``."""
    text = json.dumps(sorted((name, *found) for name, found in digests.items()))
    return f"{version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_weights(parent: Path, version: int, tensors: Mapping[str, Tensor]) -> Published:
    """Write ``tensors`` below ``parent``: whole or not at all. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{version}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = []
        digests = {}
        for number, names in enumerate(_parts(tensors)):
            part = {name: tensors[name].detach().contiguous() for name in names}
            digests |= {name: digest_of(tensor) for name, tensor in part.items()}
            file = f"weights-{number:05d}.safetensors"
            try:
                save_file(part, temporary / file)
            except SafetensorError as error:  # what it makes of a full disk, too
                raise OSError(f"{temporary / file}: {error}") from error
            files.append({"file": file, "bytes": (temporary / file).stat().st_size})
        name = weights_name(version, digests)
        index = {"name": name, "version": version, "files": files, "tensors": digests}
        (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
        folder = parent / name
        if not folder.exists():  # else they are published already, and may be being read
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Published(version, name, folder, digests)


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of one file after the other; a tensor is never cut."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        more = tensor.numel() * tensor.element_size()
        if part and size + more > MAX_FILE:
            yield part
            part = []
            size = 0
        part.append(name)
        size += more
    if part:
        yield part


def read_index(place: Place) -> dict[str, Any]:
    """The index of the weights at ``place``. Raises ValueError where there are none, or others."""
    if place.transfer is not None:
        return {"name": place.name}
    try:
        index = json.loads(_read(place, INDEX))
        name = index["name"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{_where(place)}: {INDEX} is no index of published weights") from error
    if name != place.name:
        raise ValueError(f"{_where(place)} holds weights {name}, not {place.name}")
    return index


def read_weights(
    place: Place, index: Mapping[str, Any], worker: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``index``, one file at a time, each compared with its digest, or as they are
    sent to this ``worker`` of a server: to be copied before the server answers. Raises ValueError
    for a file or a tensor that is not what was published, and where they do not come."""
    from safetensors.torch import load

    if place.transfer is not None:
        yield from receive(place.transfer, worker)
        return
    wanted = dict(index["tensors"])
    for entry in index["files"]:
        data = _read(place, entry["file"])
        if len(data) != entry["bytes"]:
            raise ValueError(
                f"{_where(place)}/{entry['file']}: {len(data)} bytes of {entry['bytes']} arrived"
            )
        for name, tensor in load(data).items():
            if wanted.pop(name, (None,))[0] != digest(tensor):
                raise ValueError(
                    f"{_where(place)}/{entry['file']}: {name} is not what was published"
                )
            yield name, tensor
    if wanted:
        raise ValueError(f"{_where(place)}: {next(iter(wanted))} is missing")


def _where(place: Place) -> str:
    return str(place.path or place.url)


def _read(place: Place, file: str) -> bytes:
    if place.path is not None:
        try:
            return (Path(place.path) / file).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{place.path}/{file} cannot be read here ({error.strerror}): the directory of "
                "--rollout_weights_dir must be seen by the servers too, or take --rollout_sync http"
            ) from error
    headers = {"Authorization": f"Bearer {place.token}"} if place.token else {}
    request = urllib.request.Request(f"{place.url}/{file}", headers=headers)
    # A proxy of the environment leads out of the private network that weights stay in.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.read()
    except (OSError, urllib.error.URLError) as error:
        raise ValueError(f"{place.url}/{file} cannot be fetched ({error})") from error
