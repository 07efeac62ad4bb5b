"""What a stream reads: files of any kind, and data sets of the hub, each a sequence of raw rows
that can be read again, with a stamp by which a change is noticed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.input_files import (
    choose_split,
    find_sources,
    may_be_on_hub,
    warn_of_fewer,
)
from coati.dataset.rows.input_names import Source, parse_input
from coati.dataset.rows.joined_rows import joined, whole_rows
from coati.utils.file_samples import SAMPLED_BYTES, SAMPLES, sampled_hash
from coati.utils.logging import get_logger

logger = get_logger(__name__)

Stamp = dict[str, Any]
WHOLE = (SAMPLES + 1) * SAMPLED_BYTES  # up to here a file's hash is of all its bytes


class RowSource(Protocol):
    """``name``: for messages; ``layout``: what its columns are. Rows are (line, raw row), as
    :func:`~coati.dataset.rows.readers.read_rows` gives them."""

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> Layout: ...

    def rows(self) -> Iterator[tuple[int, Any]]:
        """All rows, from the first. Raises ValueError for a file that was changed since the run
        began, OSError for what cannot be read."""

    def stamp(self) -> Stamp:
        """What it was, for checkpoints."""


class FileSource:
    """One data file, or the first ``rows`` of it. Its size and time are those of the moment it was
    found. ``documents``: what of a .txt file is a row, as of
    :func:`~coati.dataset.rows.readers.read_rows`."""

    def __init__(
        self,
        path: Path,
        layout: Layout | None = None,
        rows: int | None = None,
        documents: str | None = None,
    ) -> None:
        self.path = path
        self.layout = layout or Layout()
        self.limit = rows
        self.documents = documents
        self._found = self._state()

    @property
    def name(self) -> str:
        return str(self.path)

    def _state(self) -> tuple[int, int]:
        state = self.path.stat()
        return state.st_size, state.st_mtime_ns

    def rows(self) -> Iterator[tuple[int, Any]]:
        self._check()
        yield from islice(whole_rows(self.path, self.documents, self.layout), self.limit)
        self._check()

    def _check(self) -> None:
        if self._state() != self._found:
            raise ValueError(
                f"--dataset {self.path}: was changed while it was read (it had {self._found[0]} "
                f"bytes, now {self._state()[0]}); start a new run when it is complete"
            )

    def stamp(self) -> Stamp:
        size, changed = self._found
        return {
            "name": str(self.path),
            "bytes": size,
            "changed": changed,
            "hash": sampled_hash(self.path),
            "rows": self.limit,
        }


@dataclass(frozen=True)
class HubSource:
    """One shard of a data set of the hub, read over the network in ``datasets``' streaming mode.

    ``revision``: the commit that is read; ``shard`` None: all of them, ``limit``: the first rows.
    """

    data: Any
    label: str
    revision: str
    shard: int | None
    layout: Layout = field(default_factory=Layout)
    limit: int | None = None

    @property
    def name(self) -> str:
        return self.label if self.shard is None else f"{self.label} (shard {self.shard})"

    @cached_property
    def _rows(self) -> Any:
        if self.shard is None or self.data.num_shards < 2:
            return self.data
        return self.data.shard(self.data.num_shards, self.shard)

    def rows(self) -> Iterator[tuple[int, Any]]:
        try:
            yield from islice(joined(enumerate(self._rows, 1), self.layout), self.limit)
        except (ValueError, OSError):
            raise
        except Exception as error:  # of the network, of some twenty types
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"--dataset {self.name}: cannot be read on ({said})") from error

    def stamp(self) -> Stamp:
        return {"name": self.name, "path": self.label, "revision": self.revision}


def is_hub_name(path: str) -> bool:
    """``owner/name``, with ``:subset``, ``@split`` or ``#N`` behind it, where nothing of that name
    is here."""
    return may_be_on_hub(parse_input(path).base)


def sources_of(
    path: str,
    split: str | None = None,
    revisions: Mapping[str, str] | None = None,
    documents: str | None = None,
    layout: Layout | None = None,
) -> list[RowSource]:
    """The sources behind one path of ``--dataset``. ``revisions``: the commits of data sets of the
    hub, by name; by default the newest. ``layout``: what its columns are, where it does not say.

    Raises ValueError for a path that is not there, holds no data, or is prepared already.
    """
    if is_hub_name(path):
        return _hub_sources(path, revisions or {}, layout or Layout())
    return _limited(find_sources([path], split, layout), documents)


def _limited(found: Sequence[Source], documents: str | None) -> list[RowSource]:
    """The files with the rows that are wanted of each: of those of one input together the first
    ones."""
    sources: list[RowSource] = []
    left: dict[int, int] = {}
    for source in found:
        wanted = None
        if source.limit is not None:
            rest = left.setdefault(source.number, source.limit)
            rows = whole_rows(source.path, documents, source.layout)
            wanted = sum(1 for _ in islice(rows, rest))
            left[source.number] -= wanted
        if wanted != 0:
            sources.append(FileSource(source.path, source.layout, wanted, documents))
    warn_of_fewer(found, left)
    return sources


def _hub_sources(path: str, revisions: Mapping[str, str], layout: Layout) -> list[RowSource]:
    import datasets
    from huggingface_hub import HfApi

    asked = parse_input(path)
    name = asked.base
    try:
        revision = revisions.get(path) or HfApi().dataset_info(name).sha
        splits = datasets.load_dataset(name, asked.subset, streaming=True, revision=revision)
    except Exception as error:  # the libraries raise some twenty types, most from the network
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--dataset {path}: there is no such file or folder, nor can a data set of this name "
            f"be streamed from the hub here ({said})"
        ) from error
    data = splits[choose_split(list(splits), asked.split, name)]
    logger.info(f"{path}: streamed from the hub, commit {str(revision)[:12]}")
    if asked.rows is not None:
        return [HubSource(data, path, str(revision), None, layout, asked.rows)]
    shards = range(data.num_shards)
    return [HubSource(data, path, str(revision), shard, layout) for shard in shards]


def revisions_of(stamps: Sequence[Stamp]) -> dict[str, str]:
    """The commits of the data sets of the hub that ``stamps`` were taken of, by their path."""
    return {stamp["path"]: stamp["revision"] for stamp in stamps if "revision" in stamp}


def change_of(before: Stamp, now: Stamp) -> str | None:
    """What is other in ``now`` than it was, in words; None where it is the same rows.

    A file is known by its size and samples of its bytes, wherever it lies; of a large one in the
    same place the time counts too, since samples are not all of it.
    """
    if "revision" in now or "revision" in before:
        return None if before == now else f"{now['name']} is of another commit"
    if before["bytes"] != now["bytes"]:
        return f"{now['name']} has {now['bytes']} bytes, it had {before['bytes']}"
    if before["hash"] != now["hash"]:
        return f"{now['name']} holds other bytes than it did"
    if before.get("rows") != now.get("rows"):
        return f"of {now['name']} other rows are read than before (#N)"
    same_place = before["name"] == now["name"]
    if same_place and now["bytes"] > WHOLE and before["changed"] != now["changed"]:
        seconds, rest = divmod(before["changed"], 10**9)
        return (
            f"{now['name']} was written again; if it holds the same bytes, give it its time back: "
            f"touch -d @{seconds}.{rest:09d} {now['name']}"
        )
    return None
