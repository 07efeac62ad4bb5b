"""Global batches of a stream: gone on with after any step to the row, for any number of processes,
with nothing lost at the end of an epoch."""

import json
from collections import Counter
from itertools import product

import pytest

from coati.dataset.stream import row_stream, source_order
from coati.parallel.checkpoint import RunningState
from coati.trainer.global_batches import total_steps
from tests.dataset.stream.streams import batches, loader, said, stream, write_files

STEPS = 17  # of 4 rows: more than an epoch of every case
COUNTS = (13, 1, 21)
BAD = (2, 14, 30)
# Every case of --streaming that decides the order or the cut: 36, and each is interrupted after
# every step.
CASES = list(
    product(
        (0, 6, 100),  # shuffle buffer: in order, blocks, the whole of it
        ("whole", "per_turn"),  # rows of one source row: one, or one for each response
        (None, 120),  # packed or not
        (1, 2, "mixture"),  # processes; several streams by weight
    )
)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(row_stream, "WINDOW", 15)
    monkeypatch.setattr(source_order, "CHUNK_ROWS", 4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return [
        write_files(folder / "first", *COUNTS, bad=BAD),
        write_files(folder / "second", 9, 4),
    ]


def given(rows, buffer, use, pack_length, kind, **more):
    mixed = kind == "mixture"
    return stream(
        *(rows if mixed else rows[:1]),
        weights=[2, 1] if mixed else [],
        buffer=buffer,
        use=use,
        pack_length=pack_length,
        **more,
    )


def texts(batch) -> list:
    return [
        [said(row) for row in entry] if isinstance(entry, list) else said(entry) for entry in batch
    ]


def taken(found, steps: int, at=(0, 0)):
    """(entries, state, position) of each step."""
    for batch in batches(found, steps, at):
        state = json.loads(json.dumps(found.state_dict()))
        yield texts(batch), state, found.position_after(0, 0)


@pytest.mark.parametrize("buffer, use, pack_length, kind", CASES)
def test_a_stream_goes_on_after_any_step_with_the_next_row(rows, buffer, use, pack_length, kind):
    ranks = 2 if kind == 2 else 1

    def fresh(rank=0, state=None):
        found = given(rows, buffer, use, pack_length, kind, state=state)
        return loader(found, rank=rank, ranks=ranks)

    for rank in range(ranks):
        whole = list(taken(fresh(rank), STEPS))
        assert whole[-1][2][0] >= (kind != "mixture" and pack_length is None)
        # Every step once, each fourth followed to the end.
        for step, (_, state, at) in enumerate(whole[:-1], 1):
            more = STEPS - step if step % 4 == 0 else 1
            assert list(taken(fresh(rank, state), more, at)) == whole[step : step + more], step


def test_ranks_share_the_global_batch_of_one_process(rows):
    alone = list(batches(loader(given(rows, 6, "whole", None, 1), 8), 6))
    both = [
        list(batches(loader(given(rows, 6, "whole", None, 2), 8, rank, 2), 6)) for rank in (0, 1)
    ]
    for whole, first, second in zip(alone, *both, strict=True):
        parts = [first[:2], second[:2], first[2:], second[2:]]
        assert texts(whole) == texts([row for part in parts for row in part])


def test_a_resumed_run_may_cut_the_stream_into_other_batches(rows):
    whole = [
        row
        for batch, _, _ in taken(loader(given(rows, 6, "per_turn", None, 1)), 12)
        for row in batch
    ]
    *_, (_, state, at) = taken(loader(given(rows, 6, "per_turn", None, 1)), 5)
    rest = loader(given(rows, 6, "per_turn", None, 1, state=state), 14)
    assert [row for batch, _, _ in taken(rest, 2, at) for row in batch] == whole[20:48]


def test_a_resumed_run_may_have_other_processes(rows):
    whole = [batch for batch, _, _ in taken(loader(given(rows, 6, "whole", None, 1), 8), 4)]
    *_, (_, state, at) = taken(loader(given(rows, 6, "whole", None, 1), 8), 2)
    both = []
    for rank in (0, 1):
        found = loader(given(rows, 6, "whole", None, 1, state=state), 8, rank, 2)
        both.append([batch for batch, _, _ in taken(found, 2, at)])
    for step, (first, second) in enumerate(zip(*both, strict=True), 2):
        assert [*first[:2], *second[:2], *first[2:], *second[2:]] == whole[step]


@pytest.mark.parametrize("use, each", [("whole", 1), ("per_turn", 2)])
def test_nothing_is_lost_at_the_end_of_an_epoch(rows, use, each):
    found = loader(given(rows, 6, use, None, 1))
    used = sum(COUNTS) - len(BAD)
    seen: Counter = Counter()
    positions = []
    for batch, _, at in taken(found, 3 * used * each // 4):
        seen.update(batch)
        positions.append(at)
    per_epoch = sum(seen.values()) / 3
    assert len(seen) == used * each if use == "whole" else len(seen) >= per_epoch - 4
    assert max(seen.values()) - min(seen.values()) <= 1
    # An epoch's last rows share a global batch with the first of the next.
    assert [at[0] for at in positions] == sorted(at[0] for at in positions)
    assert all(0 <= at[1] < used * 3 for at in positions)


def test_the_position_says_epoch_and_rows_done(rows):
    found = loader(given(rows, 0, "whole", None, 1))
    at = [position for _, _, position in taken(found, 9)]
    assert at == [(0, 4 * n) for n in range(1, 8)] + [(1, 0), (1, 4)]  # 32 rows can be used
    assert found.count(0) > 2**60 and found.rows_per_step == 4


def test_the_rows_of_a_step_are_named(rows):
    found = loader(given(rows, 0, "whole", None, 1))
    list(batches(found, 1))
    file = rows[0] / "part-0.jsonl"
    assert found.rows_at(0, 0) == [f"{file}:{line}" for line in (1, 2, 4, 5)]


def test_counts_of_what_was_left_out_survive_a_resume(rows, caplog):
    *_, (_, state, at) = taken(loader(given(rows, 6, "whole", None, 1)), 6)
    assert 0 < state["read"] < sum(COUNTS) and state["kept"] < state["read"]
    caplog.clear()
    rest = given(rows, 6, "whole", None, 1, state=state)
    list(taken(loader(rest), 6, at))
    assert f"rows read {sum(COUNTS)}, kept 32, dropped 3; training rows 32" in caplog.text


def test_rows_before_the_window_are_not_tokenized_again(rows, monkeypatch):
    *_, (_, state, at) = taken(loader(given(rows, 6, "whole", None, 1)), 7)
    seen = []
    original = row_stream.StreamWorker.run

    def run(self, chunk, evaluation):
        seen.append(len(chunk))
        return original(self, chunk, evaluation)

    monkeypatch.setattr(row_stream.StreamWorker, "run", run)
    list(taken(loader(given(rows, 6, "whole", None, 1, state=state)), 1, at))
    assert state["read"] >= 16 and sum(seen) <= 35 - state["read"]


def test_partners_are_the_next_rows_of_the_global_batch(rows):
    answers = [{"prompt": "q", "completion": f"say {n}", "label": n % 2 == 0} for n in range(9)]
    from tests.dataset.stream.streams import write_lines

    path = write_lines(rows[0].parent / "kto.jsonl", answers)
    found = loader(stream(path, type="kto", buffer=0), 4, partners=True)
    batch = next(iter(batches(found, 1)))
    completions = [row["completion"] for row in batch]
    assert [row["kl_completion"] for row in batch] == [*completions[1:], completions[0]]


def test_the_steps_of_a_run_over_a_stream_are_max_steps(rows):
    found = loader(given(rows, 0, "whole", None, 1))
    state = RunningState(epoch=3, step=40, sample_start_index=7)
    assert total_steps(state, found.count, found.rows_per_step, 2**62, 50) == 50
    assert total_steps(RunningState(), lambda _: 10, 4, 3) == 6
    assert (
        total_steps(RunningState(epoch=1, step=5, sample_start_index=8), lambda _: 10, 4, 3, 6) == 6
    )
