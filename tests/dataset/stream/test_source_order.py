"""The order of a stream: every row once an epoch, by seed and epoch alone, entered anywhere."""

import weakref
from collections import Counter
from itertools import islice

import pytest

from coati.dataset.stream import source_order
from coati.dataset.stream.source_order import (
    CHUNK_ROWS,
    Position,
    SourceOrder,
    SourceRows,
    from_state,
)


class Rows:
    """A source of the rows ``name-0``, ``name-1`` ...; ``opened``: how often it was read."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self.opened = 0

    def rows(self):
        self.opened += 1
        for number in range(self.count):
            yield number + 1, f"{self.name}-{number}"

    def stamp(self):
        return {"name": self.name}


def sources(*counts: int) -> list[Rows]:
    return [Rows("abcdefgh"[number], count) for number, count in enumerate(counts)]


def order(found: list[Rows], buffer: int, seed: int = 3, **more) -> SourceOrder:
    return SourceOrder(found, seed=seed, buffer=buffer, **more)


def texts(rows) -> list[str]:
    return [row for _, (_, _, row) in rows]


COUNTS = (7, 1, 0, 12, 5)
ALL = [text for source in sources(*COUNTS) for _, text in source.rows()]


def test_without_a_buffer_rows_stand_in_the_order_of_their_files():
    found = [row for _, row in order(sources(2, 3), 0).rows(5)]
    assert found == [(0, 1, "a-0"), (0, 2, "a-1"), (1, 1, "b-0"), (1, 2, "b-1"), (1, 3, "b-2")]


@pytest.mark.parametrize("buffer", [1, 4, 25, 1000])
def test_each_epoch_has_every_row_once_in_another_order_of_seed_and_epoch_alone(buffer):
    epochs = [texts(order(sources(*COUNTS), buffer).rows(epoch)) for epoch in range(4)]
    assert all(sorted(epoch) == sorted(ALL) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert texts(order(sources(*COUNTS), buffer).rows(2)) == epochs[2]
    assert texts(order(sources(*COUNTS), buffer, seed=4).rows(2)) != epochs[2]


def test_data_that_fit_into_the_buffer_are_shuffled_as_a_whole():
    first = texts(order(sources(100), 1000).rows(0))
    moved = [abs(place - int(text[2:])) for place, text in enumerate(first)]
    assert sum(moved) / 100 > 20  # of a random order: 33


def test_a_row_moves_within_its_block_and_the_borders_are_others_in_each_epoch():
    found = {epoch: texts(order(sources(64), 8).rows(epoch)) for epoch in range(6)}
    borders = set()
    for rows in found.values():
        numbers = [int(text[2:]) for text in rows]
        assert all(abs(place - number) < 8 for place, number in enumerate(numbers))
        ends = [end for end in range(1, 64) if max(numbers[:end]) < end]
        borders.add(tuple(ends))
    assert len(borders) > 3


@pytest.mark.parametrize("buffer", [0, 4, 9, 1000])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_order_is_entered_at_any_row(buffer, epoch):
    whole = list(order(sources(*COUNTS), buffer).rows(epoch))
    counts = dict(enumerate(COUNTS))
    for start in range(len(whole) + 1):
        begin = whole[start - 1][0] if start else 0
        fresh = order(sources(*COUNTS), buffer)
        assert list(fresh.rows(epoch, begin, start)) == whole[start:], start
        known = order(sources(*COUNTS), buffer, counts=dict(counts))
        assert list(known.rows(epoch, begin, start)) == whole[start:], start


def test_files_before_the_place_are_not_opened_where_their_rows_are_counted():
    found = sources(10, 10, 10)
    begin = list(order(sources(10, 10, 10), 4).rows(1))[24][0]
    rows = order(found, 4, counts={0: 10, 1: 10, 2: 10}).rows(1, begin, 25)
    next(rows)
    assert sorted(source.opened for source in found) == [0, 0, 1]


class Raw(str):
    """A row that can be watched."""

    __slots__ = ("__weakref__",)


def test_memory_holds_a_block_and_no_more():
    alive: weakref.WeakSet = weakref.WeakSet()

    class Watched(Rows):
        def rows(self):
            for line, text in super().rows():
                row = Raw(text)
                alive.add(row)
                yield line, row

    most = 0
    for count, _ in enumerate(order([Watched("a", 2000)], 50).rows(0)):
        most = max(most, len(alive)) if count else most
    assert 50 <= most <= 53


def chunks(found: SourceRows, position=None, count: int = 40):
    return list(islice(found.chunks(position or found.beginning), count))


def test_chunks_cover_the_rows_and_end_with_an_epoch():
    found = SourceRows([order(sources(50, 20), 0)], [1], 0)
    got = chunks(found, count=8)
    assert [len(chunk.rows) for chunk in got] == [32, 32, 6, 0, 32, 32, 6, 0] and CHUNK_ROWS == 32
    assert [chunk.ends for chunk in got] == [False, False, False, True] * 2
    assert got[1].after == Position(((0, 64, 64),), 64) and got[3].after.at == ((1, 0, 0),)


def test_long_rows_come_in_smaller_chunks():
    class Long(Rows):
        def rows(self):
            yield from ((line, "x" * 600_000) for line in range(1, 6))

    got = chunks(SourceRows([order([Long("a", 5)], 0)], [1], 0), count=4)
    assert [len(chunk.rows) for chunk in got] == [2, 2, 1, 0]


@pytest.mark.parametrize("weights", [[1], [3, 1, 1]])
def test_chunks_go_on_from_behind_any_chunk(weights):
    def fresh() -> SourceRows:
        orders = [order(sources(30, 9), 8, number=number) for number in range(len(weights))]
        return SourceRows(orders, weights, 7)

    whole = chunks(fresh())
    for place, chunk in enumerate(whole[:-1]):
        assert chunks(fresh(), chunk.after, 40 - place - 1) == whole[place + 1 :], place


def test_a_mixture_draws_by_weight_and_each_stream_gives_each_row_before_any_again():
    orders = [
        SourceOrder([Rows(name, count)], seed=1, buffer=8, first=number, number=number)
        for number, (name, count) in enumerate((("a", 40), ("b", 300)))
    ]
    rows = [row for chunk in chunks(SourceRows(orders, [3, 1], 5)) for row in chunk.rows]
    found = [text for _, _, text in rows]
    share = sum(text.startswith("a") for text in found) / len(rows)
    assert 0.7 < share < 0.8
    times = Counter(text for text in found if text.startswith("a"))
    assert len(times) == 40 and max(times.values()) - min(times.values()) <= 1
    assert {file for file, _, text in rows if text.startswith("b")} == {1}


def test_an_epoch_of_a_mixture_ends_when_every_stream_was_read():
    orders = [order([Rows(name, 10)], 0, number=number) for number, name in enumerate("ab")]
    got = chunks(SourceRows(orders, [4, 1], 5), count=12)
    ends = [chunk.after for chunk in got if chunk.ends]
    assert [min(place[0] for place in position.at) for position in ends] == [1, 2, 3, 4]


def test_a_stream_without_rows_is_named():
    found = SourceRows([order([Rows("empty.jsonl", 0)], 4)], [1], 0)
    with pytest.raises(ValueError, match=r"--dataset empty.jsonl: no rows found"):
        chunks(found)


def test_positions_survive_json():
    fresh = Position(((0, 0, 0), (0, 0, 0)))
    assert from_state({}, fresh) == fresh
    state = {"at": [[1, 4, 5], [0, 0, 7]], "drawn": 40}
    assert from_state(state, fresh) == Position(((1, 4, 5), (0, 0, 7)), 40)


@pytest.mark.parametrize("row", ["x" * 900, b"x" * 900, {"messages": [{"content": "x" * 900}]}])
def test_a_block_of_long_rows_is_smaller_and_entered_all_the_same(monkeypatch, row):
    monkeypatch.setattr(source_order, "BLOCK_BYTES", 5000)

    class Long(Rows):
        def rows(self):
            yield from ((line, row) for line in range(1, self.count + 1))

    whole = list(order([Long("a", 40)], 1000).rows(1))
    assert [begin for begin, _ in whole[::6]] == [0, 6, 12, 18, 24, 30, 36]
    assert sorted(line for _, (_, line, _) in whole) == list(range(1, 41))
    for start in range(1, 41):
        begin = whole[start - 1][0]
        assert list(order([Long("a", 40)], 1000).rows(1, begin, start)) == whole[start:]
