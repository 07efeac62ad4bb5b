"""Partners of judged responses: the next row of the whole global batch, however it is cut."""

import pytest

from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader, following


class Rows(list):
    column_names = ("prompt", "completion", "label", "seq_length")

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def rows(count: int) -> Rows:
    return Rows(
        {"prompt": [1], "completion": [row], "label": True, "seq_length": 2} for row in range(count)
    )


class Collate:
    """Batches as (answer, partner's answer) pairs."""

    def __call__(self, rows):
        return [(row["completion"], row["kl_completion"]) for row in rows]

    def blank(self, row):
        return {"completion": [], "kl_completion": []}


def global_batch(batch_size: int, accumulation: int, dp_size: int) -> list:
    """The pairs of the first global batch, of all ranks, in its order."""
    ranks = [
        next(
            GlobalBatchLoader(
                rows(12),
                Collate(),
                batch_size=batch_size,
                accumulation_steps=accumulation,
                dp_rank=rank,
                dp_size=dp_size,
                partners=True,
            ).global_batches(0)
        )
        for rank in range(dp_size)
    ]
    return [
        pair
        for micro_batches in zip(*ranks, strict=True)
        for batch in micro_batches
        for pair in batch
    ]


def test_partners_rotate_by_one_and_are_never_the_row_itself():
    assert following([4, 7, 9]) == [7, 9, 4]
    assert following([4]) == [None]
    assert following([4, 4, 9]) == [9, 9, 4]  # a row that a mixture draws twice


@pytest.mark.parametrize("cut", [(6, 1, 1), (3, 2, 1), (1, 6, 1), (3, 1, 2), (1, 3, 2), (1, 2, 3)])
def test_the_cut_of_a_global_batch_changes_no_partner(cut):
    assert global_batch(*cut) == global_batch(6, 1, 1)
    answers = [answer for answer, _ in global_batch(*cut)]
    assert [partner for _, partner in global_batch(*cut)] == answers[1:] + answers[:1]


def test_a_global_batch_of_one_has_no_partner():
    assert global_batch(1, 1, 1)[0][1] == []


def test_an_evaluation_is_one_global_batch_over_all_batches_and_ranks():
    found = []
    for rank in range(2):
        loader = EvaluationLoader(
            rows(5), Collate(), batch_size=1, dp_rank=rank, dp_size=2, partners=True
        )
        found += [pair for batch in loader for pair in batch]
    assert sorted(found) == [([], []), ([0], [1]), ([1], [2]), ([2], [3]), ([3], [4]), ([4], [0])]
