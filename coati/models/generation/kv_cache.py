"""Key-value caches of the decoder: written in place, compacted when rows leave."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

GROWTH = 256  # columns that are added at a time
_WORTHWHILE = 64  # free columns on the left that are used before any are added
# Attributes of transformers' cache layers: {index: state}, and keys and values.
_STATES = ("conv_states", "recurrent_states")
_KEYS = ("keys", "values")
_INDEXER = "indexer_keys"  # of attention that first chooses tokens


class RowCache(DynamicCache):
    """Keys and values (rows, heads, columns, D) of each layer, in preallocated buffers.

    A model is shown the columns from ``start`` to ``end`` of the first ``rows`` rows. ``limit``:
    columns that will ever be needed.
    """

    def __init__(self, rows: int, limit: int) -> None:
        super().__init__()
        self.rows = rows
        self.limit = limit
        self.start = self.end = 0
        self._layers: list[list[Tensor]] = []
        self._places: tuple[Tensor, Tensor] | None = None
        self._width = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ):
        """Append (rows, heads, n, D) new keys and values; returns views of all that the layer
        holds, or of as many columns as the layer cuts its mask to."""
        # Gemini's tensors do not follow in-place operations.
        states = [new.as_subclass(Tensor) for new in (key_states, value_states)]
        if self._places is not None:
            return self._place(states, layer_idx)
        count = states[0].shape[2]
        if layer_idx == 0:
            self._make_room(count)
            self.end += count
        for buffer, new in zip(self._buffers(layer_idx, states, self.end), states, strict=True):
            buffer[: self.rows, :, self.end - count : self.end] = new
        shown = self[layer_idx]
        window = _window_of_mask(*args, **kwargs)
        return shown if window is None else tuple(s[:, :, -max(count, window) :] for s in shown)

    def extend(self) -> None:
        """Show one more column, whose keys and values each layer then gets by :meth:`write`."""
        self._make_room(1)
        self.end += 1

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put (rows, heads, D) keys and values into the last column of ``layer``; returns views of
        all that it holds."""
        views = []
        for buffer, new in zip(self._layers[layer], (keys, values), strict=True):
            row, head, column, _ = buffer.stride()
            heads, width = new.shape[1:]
            last = (self.end - 1) * column
            buffer.as_strided(new.shape, (row, head, 1), last).copy_(new)
            shown = (self.rows, heads, self.end - self.start, width)
            views.append(buffer.as_strided(shown, (row, head, column, 1), self.start * column))
        return views[0], views[1]

    def rewind(self) -> None:
        """Show the last column no longer."""
        self.end -= 1

    @contextmanager
    def filled_without_padding(self, mask: Tensor) -> Iterator[None]:
        """A forward inside the block brings the real tokens of ``mask`` (rows, P) as one row; they
        go to their columns of ``mask``."""
        rows, columns = mask.nonzero(as_tuple=True)
        self._places = (rows, columns)
        self._width = mask.shape[1]
        yield
        self._places = None
        self.end = self._width

    def _place(self, states: list[Tensor], layer: int):
        rows, columns = self._places
        for buffer, new in zip(self._buffers(layer, states, self._width), states, strict=True):
            buffer[rows, :, columns] = new[0].transpose(0, 1)
        return states

    def _buffers(self, layer: int, states: list[Tensor], columns: int) -> list[Tensor]:
        """The layer's buffers, with room for ``columns``."""
        if layer < len(self._layers):
            return self._layers[layer]
        width = self._width_for(columns)
        # Zeros, not whatever was there: masked columns are still multiplied, and NaN x 0 is NaN.
        made = [new.new_zeros(self.rows, new.shape[1], width, new.shape[3]) for new in states]
        self._layers.append(made)
        return made

    def _width_for(self, columns: int) -> int:
        return min(max(self.limit, columns), columns + GROWTH)

    def _make_room(self, count: int) -> None:
        """Room for ``count`` more columns in all buffers: what is shown moves to the left, where
        enough columns are free there, or to larger buffers."""
        if not self._layers or self.end + count <= self._layers[0][0].shape[2]:
            return
        shown = self.end - self.start
        held = self._layers[0][0].shape[2]
        enough = self.start >= max(count, _WORTHWHILE)
        width = held if enough else self._width_for(shown + count)
        for layer in self._layers:
            for place, buffer in enumerate(layer):
                moved = buffer[: self.rows, :, self.start : self.end]
                if not enough:
                    rows, heads, _, size = buffer.shape
                    layer[place] = buffer.new_zeros(rows, heads, width, size)
                layer[place][: self.rows, :, :shown] = moved.clone() if enough else moved
        self.start = 0
        self.end = shown

    def keep(self, survivors: Tensor) -> None:
        """Row i becomes row ``survivors[i]`` (at least i); only rows that change are moved."""
        moved = (survivors != torch.arange(len(survivors), device=survivors.device)).nonzero()[:, 0]
        columns = slice(self.start, self.end)
        if len(moved):
            for buffer in (buffer for layer in self._layers for buffer in layer):
                buffer[moved, :, columns] = buffer[survivors[moved], :, columns]
        self.rows = len(survivors)

    def repeat(self, index: Tensor) -> None:
        """Row i becomes a copy of row ``index[i]``: as many rows as ``index`` has."""
        self._layers = [
            [buffer.index_select(0, index) for buffer in layer] for layer in self._layers
        ]
        self.rows = len(index)

    def trim(self, columns: int) -> bool:
        """The first ``columns``, which hold padding alone, are no longer shown."""
        self.start += columns
        return True

    def row(self, row: int, first: int = 0) -> "RowCache":
        """A cache of one row alone, from column ``first`` on, a copy."""
        made = RowCache(1, self.limit)
        one = slice(row, row + 1)
        made._layers = [[state[one, :, first:].clone() for state in layer] for layer in self]
        made.end = self.get_seq_length() - first
        return made

    def join(self, other: "RowCache") -> None:
        """The rows of ``other`` below these; rows of fewer columns get empty ones on their left."""
        rows = self.rows + other.rows
        first = self.end - other.get_seq_length()
        if first >= 0 and rows <= len(self._layers[0][0]):  # into slots of rows that have left
            for mine, theirs in zip(self._layers, other, strict=True):
                for buffer, new in zip(mine, theirs, strict=True):
                    buffer[self.rows : rows, :, first : self.end] = new
            self.rows = rows
            self.start = min(self.start, first)
            return
        self._join_anew(other)

    def _join_anew(self, other: "RowCache") -> None:
        columns = max(self.get_seq_length(), other.get_seq_length())
        rows = self.rows + other.rows
        for layer, (mine, theirs) in enumerate(zip(self, other, strict=True)):
            self._layers[layer] = [
                _below(*pair, columns, columns + GROWTH) for pair in zip(mine, theirs, strict=True)
            ]
        self.rows = rows
        self.start = 0
        self.end = columns

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """The number of columns that the model is shown."""
        return self.end - self.start

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a layer's mask covers and the first one's offset; transformers 5 asks before
        any layer is filled."""
        count = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + count, 0

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, ...]:
        return tuple(b[: self.rows, :, self.start : self.end] for b in self._layers[layer_idx])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self[layer] for layer in range(len(self._layers)))

    def __len__(self) -> int:
        return len(self._layers)


def _window_of_mask(cache_kwargs: Any = None, **_: Any) -> int | None:
    """The last columns of its mask that a layer with a sliding window keeps: Gemma 2, Gemma 3 and
    Cohere 2 of transformers 4 cut it to what a HybridCache would hold, and say so here."""
    return cache_kwargs.get("sliding_window") if isinstance(cache_kwargs, dict) else None


class LayerCache(DynamicCache):
    """transformers' own cache, for models some of whose layers keep a state of all tokens so far
    (convolutions, linear attention, state-space layers) or the last tokens of a chunk alone.

    Left padding never enters a state: transformers' layers set padded inputs to zero.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.rows = 0
        self._columns = 0

    def keep(self, survivors: Tensor) -> None:
        """Row i becomes row ``survivors[i]``."""
        self._map(lambda tensor: tensor.index_select(0, survivors))
        self.rows = len(survivors)

    repeat = keep

    def trim(self, columns: int) -> bool:
        """Nothing is dropped; the layers are transformers' own."""
        return False

    def join(self, other: "LayerCache") -> None:
        """The rows of ``other`` below these; keys and values of fewer columns are padded on the
        left."""
        pairs: Iterable[tuple[Any, Any]] = zip(self.layers, other.layers, strict=True)
        for mine, theirs in pairs:
            for states in _STATES:
                held = getattr(mine, states, {})
                for index, tensor in held.items():
                    if tensor is not None:
                        held[index] = torch.cat([tensor, getattr(theirs, states)[index]])
            if getattr(mine, "keys", None) is not None:
                for name in _KEYS:
                    pair = getattr(mine, name), getattr(theirs, name)
                    columns = max(tensor.shape[2] for tensor in pair)
                    setattr(mine, name, _below(*pair, columns, columns))
            if isinstance(getattr(mine, _INDEXER, None), Tensor):  # (rows, columns, D)
                pair = getattr(mine, _INDEXER)[:, None], getattr(theirs, _INDEXER)[:, None]
                columns = max(tensor.shape[2] for tensor in pair)
                setattr(mine, _INDEXER, _below(*pair, columns, columns)[:, 0])
            if hasattr(mine, "cumulative_length"):
                mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)
        self.rows += other.rows

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            for states in _STATES:
                held = getattr(layer, states, {})
                for index, tensor in held.items():
                    if tensor is not None:
                        held[index] = change(tensor)
            for name in (*_KEYS, _INDEXER):
                if isinstance(tensor := getattr(layer, name, None), Tensor) and tensor.numel():
                    setattr(layer, name, change(tensor))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of columns that the model has been shown, 0 before the first."""
        if not any(getattr(layer, "is_initialized", True) for layer in self.layers):
            return 0
        try:
            return super().get_seq_length(layer_idx)
        except ValueError:  # no layer has keys
            return self._columns


class TupleCache:
    """For model classes that know only tuples of (keys, values), each (rows, heads, columns, D), as
    GPT-2's."""

    def __init__(self) -> None:
        self.states: tuple[tuple[Tensor, ...], ...] | None = None

    def _map(self, change) -> None:
        if self.states is not None:
            self.states = tuple(tuple(change(tensor) for tensor in layer) for layer in self.states)

    def keep(self, survivors: Tensor) -> None:
        """Row i becomes row ``survivors[i]``."""
        self._map(lambda tensor: tensor.index_select(0, survivors))

    repeat = keep

    def join(self, other: "TupleCache") -> None:
        """The rows of ``other`` below these, padded on the left."""
        columns = max(self.get_seq_length(), other.get_seq_length())
        self.states = tuple(
            tuple(_below(*pair, columns, columns) for pair in zip(mine, theirs, strict=True))
            for mine, theirs in zip(self.states, other.states, strict=True)
        )

    def trim(self, columns: int) -> bool:
        """Nothing is dropped; the tuples are the model's own."""
        return False

    def get_seq_length(self) -> int:
        """The number of columns that the model is shown."""
        return 0 if self.states is None else self.states[0][0].shape[-2]


def _below(mine: Tensor, theirs: Tensor, columns: int, width: int) -> Tensor:
    """Keys or values (rows, heads, at most ``columns``, D) of two caches, one below the other, all
    ending at column ``columns`` of ``width``."""
    made = mine.new_zeros(len(mine) + len(theirs), mine.shape[1], width, mine.shape[3])
    made[: len(mine), :, columns - mine.shape[2] : columns] = mine
    made[len(mine) :, :, columns - theirs.shape[2] : columns] = theirs
    return made
