"""Groups of equal scores give their place to groups of further prompts, whoever holds them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from coati.dataset.load.loader import GlobalBatchLoader
from coati.experience_maker.experience import Experience, masks, sample_indices
from coati.experience_maker.rollout_batch import RolloutBatch
from coati.parallel.step_work import StepClock
from coati.rewards.responses import Responses
from coati.trainer import dynamic_sampling
from coati.trainer.dynamic_sampling import Refilled, refill
from coati.trainer.episodes import Episodes
from coati.utils.logging import forget_warnings
from tests.trainer.test_online import Collate, Rows

SIZE, PROMPTS, STEPS = 2, 4, 2  # responses of a group; prompts of a batch over all ranks; batches
NOWHERE = SimpleNamespace(phase=lambda text: None)
GOES_ON = SimpleNamespace(requested=False)


class Maker:
    """Prompt n's groups are equal unless n is divisible by 3; responses hold prompt and index."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(num_generations=SIZE)
        self.asked: list[tuple[list[int], list[int]]] = []
        self.clock = StepClock()

    def ask(self, batch, indices, episode, temperature):
        prompts = (batch["input_ids"][:, 0] - 10).tolist()
        self.asked.append((prompts, list(indices)))
        assert len(indices) == SIZE * len(prompts) and (episode, temperature) == (7, 0.5)
        return prompts, list(indices)

    def make_experience(self, pending):
        with self.clock.timed("reward"):
            prompts, indices = pending
        rows = [prompt for prompt in prompts for _ in range(SIZE)]
        lengths = torch.tensor([2 + row % 2 for row in rows])
        width = int(lengths.max())
        attention, actions = masks(torch.ones(len(rows), 1), lengths, width)
        written = torch.tensor([[row] * width for row in rows])
        sequences = torch.cat([torch.full((len(rows), 1), 5), written], 1)
        equal = torch.tensor([float(row % 3 != 0) for row in rows])
        numbers = torch.tensor(indices)[:, None].expand(-1, width).float()
        kept = actions & ~equal.bool()[:, None]
        index = torch.tensor(indices)
        one = Experience(sequences, attention, kept, numbers, equal, index, advantages=numbers)
        texts = Responses([str(row) for row in rows], ["r"] * len(rows))
        samples = {"equal_groups": equal, "dropped": equal, "reward": equal}
        return RolloutBatch(one, texts, {}, samples)


def loader(rank: int = 0, ranks: int = 1, count: int = 14) -> GlobalBatchLoader:
    return GlobalBatchLoader(
        Rows(count),
        Collate(),
        batch_size=PROMPTS // ranks,
        accumulation_steps=STEPS,
        dp_rank=rank,
        dp_size=ranks,
        shuffle=False,
    )


def episode(rank: int, ranks: int, rounds: int, start: int = 0):
    """What a rank collects at first, and its refill."""
    maker = Maker()
    prompts = loader(rank, ranks)
    collected = []
    batches = next(iter(prompts.global_batches(0, start)))
    for number, batch in enumerate(batches):
        count = SIZE * len(batch["input_ids"])
        indices = sample_indices(number, STEPS, rank * count, count)
        collected.append(maker.make_experience(maker.ask(batch, indices, 7, 0.5)))
    maker.asked.clear()
    maker.clock.take()
    asked = SimpleNamespace(epoch=0, start=start, prompts=PROMPTS * STEPS, temperature=0.5)
    given = {"maker": maker, "prompts": prompts, "bar": NOWHERE, "stop": GOES_ON}
    return collected, maker, lambda: refill(collected, asked, 7, rounds, **given)


def trained(batches: list[RolloutBatch]) -> dict[int, tuple[list[int], list[float]]]:
    """Index of a response -> its tokens (none where it is left out), and its own log-probs."""
    found = {}
    for batch in batches:
        one = batch.experience
        for row, index in enumerate(one.sample_index.tolist()):
            mask = one.action_mask[row]
            tokens = one.sequences[row, one.prompt_width :][mask].tolist()
            found[index] = (tokens, one.action_log_probs[row][mask].tolist())
    return found


def test_equal_groups_are_replaced_in_the_order_of_the_epoch():
    """Of prompts 0 to 7 those of 0, 3 and 6 teach; 8 to 12 fill the five places, and of them 9 and
    12; then 13, and 0 and 1 of the next epoch, fill the three that are left."""
    collected, maker, work = episode(0, 1, 2)
    before = [batch.responses for batch in collected]
    found = work()
    assert maker.clock.take() == {} and maker.clock.running  # the refill has a time of its own
    assert [prompts for prompts, _ in maker.asked] == [[8, 9, 10, 11, 12], [13, 0, 1]]
    assert replace(found, seconds=0.0) == Refilled(2, 8, 2, 1, 2, 0.0)
    kept = trained(collected)
    assert sorted(kept) == list(range(16))
    # group g of batch b has the indices 4 g + b and 4 g + b + 2; batch 0 began with prompts 0 to 3
    places = {place: kept[place][0][:1] for place in (0, 4, 8, 12, 1, 5, 9, 13)}
    assert places == {0: [0], 4: [9], 8: [], 12: [3], 1: [], 5: [0], 9: [6], 13: [12]}
    assert all(kept[place + 2][0] == kept[place][0] for place in places)
    for _, indices in maker.asked:
        assert min(indices) >= 16  # other noise than at first
    drawn = [index for _, indices in maker.asked for index in indices]
    assert len(set(drawn)) == len(drawn)
    assert [batch.responses for batch in collected] == before
    assert [int(batch.samples["equal_groups"].sum()) for batch in collected] == [4, 6]
    left = sum(int(batch.samples["dropped"].sum()) for batch in collected)
    assert left == 2 * SIZE and sum(not tokens for tokens, _ in kept.values()) == left


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_episode_is_the_same_for_any_number_of_processes(monkeypatch, ranks):
    whole, _, work = episode(0, 1, 3)
    alone = work()
    parts = [episode(rank, ranks, 3) for rank in range(ranks)]
    found = together(monkeypatch, [work for _, _, work in parts])
    assert {replace(one, seconds=0.0) for one in found} == {replace(alone, seconds=0.0)}
    kept = {index: row for batches, _, _ in parts for index, row in trained(batches).items()}
    assert kept == trained(whole)
    asked = [[len(prompts) for prompts, _ in maker.asked] for _, maker, _ in parts]
    assert all(one == asked[0] for one in asked)  # all sample equally many


def test_a_place_is_open_while_it_is_on_any_rank_of_a_tensor_parallel_group(monkeypatch):
    """A judge told one of two ranks that share a place another score."""
    first, second = episode(0, 1, 1), episode(0, 1, 1)
    first[0][0].samples["equal_groups"] = torch.ones(8)
    found = together(monkeypatch, [first[2], second[2]])
    assert found[0].prompts == found[1].prompts == 7
    assert first[1].asked == second[1].asked


def together(monkeypatch, works: list) -> list:
    """Each of ``works`` in a thread of its own, as a rank; a gather waits for all."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier, local

    barrier = Barrier(len(works), timeout=30)
    box: list = [None] * len(works)
    me = local()

    def gather(mine):
        box[me.rank] = mine
        barrier.wait()
        found = list(box)
        barrier.wait()
        return found

    def run(number):
        me.rank = number
        return works[number]()

    monkeypatch.setattr(dynamic_sampling, "all_gather_object", gather)
    monkeypatch.setattr(dynamic_sampling, "any_rank", lambda flag: flag)
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, range(len(works))))


def test_asked_to_stop_nothing_is_refilled(monkeypatch):
    _, maker, work = episode(0, 1, 3)
    monkeypatch.setattr(dynamic_sampling, "any_rank", lambda flag: True)
    assert work() is None and not maker.asked


def test_what_is_left_is_said_once(capsys):
    forget_warnings()
    for _ in range(2):
        assert episode(0, 1, 1)[2]().left == 3
    said = capsys.readouterr().err
    assert said.count("groups are left whose scores are equal") == 1
    assert "refill_left" in said


def test_prompts_go_on_into_the_next_epoch():
    prompts = loader(count=9)
    assert prompts.next_entries(0, 7, 4) == ([7, 8, 0, 1], (1, 2))
    assert prompts.next_entries(2, 9, 20)[1] == (5, 2)
    assert prompts.next_entries(0, 3, 0) == ([], (0, 3))


def test_not_with_episodes_ahead():
    with pytest.raises(ValueError, match="asked for ahead have taken already"):
        Episodes(ahead=1, refill_rounds=2)
