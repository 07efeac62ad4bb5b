"""What passes over batches cost, counted row by row by hand, and clocks of parts of a step."""

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config

from coati.models.ilql_heads import attach
from coati.parallel.footprint.model_flops import PassFlops, training_flops
from coati.parallel.footprint.model_shape import ModelShape
from coati.parallel.step_work import PassWork, StepClock
from tests.tiny import tiny_llama

# A million a token, a thousand a target, one a pair.
FORWARD = PassFlops(1e6, 1e3, 1.0)
TRAINING = PassFlops(3e6, 3e3, 3.0)


def work(window: int = 0) -> PassWork:
    windowed = 0.001 if window else 0.0
    return PassWork(PassFlops(1e6, 1e3, 1.0, windowed), TRAINING, window)


def batch(**more) -> dict[str, torch.Tensor]:
    """Rows of 3 and 2 tokens in 4 columns, the second padded on the left."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    return {"input_ids": torch.full((2, 4), 7), "attention_mask": mask, **more}


def test_padding_counts_for_nothing_and_tokens_see_their_own_row():
    made = work()
    made.add_batch(batch(), trained=False)
    assert float(made.take()) == 5e6 + (1 + 2 + 3) + (1 + 2)
    assert made.take() == 0.0


def test_log_probs_count_where_labels_ask_for_them():
    labels = torch.tensor([[7, 7, 7, -100], [-100, -100, -100, 7]])
    made = work()
    made.add_batch(batch(labels=labels), trained=True)
    # Nothing predicts the first token of a row.
    assert float(made.take()) == 3 * (5e6 + 3e3 + 9)


def test_rows_of_a_pack_do_not_see_each_other():
    made = work()
    packed = {
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }
    made.add_batch(packed, trained=False)
    assert float(made.take()) == 5e6 + 6 + 3


def test_rows_without_a_mask_are_real_throughout():
    made = work()
    made.add_batch({"input_ids": torch.zeros(2, 3)}, trained=False)
    without = float(made.take())
    made.add_batch({"attention_mask": torch.ones(2, 3)}, trained=False)
    assert without == float(made.take()) > 0


def test_tokens_that_rows_share_count_once():
    """A prefix of 2 tokens, which rows of 3 and 4 continue."""
    labels = torch.tensor([[-100, -100, 7, -100], [-100, -100, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    made = work()
    shared = torch.tensor([[0, 1, 2, 2, 3]])
    made.add_batch({"attention_mask": mask, "labels": labels}, trained=True, shared=shared)
    assert float(made.take()) == 3 * (5e6 + 3 * 1e3 + (1 + 2 + 3 + 3 + 4))


def test_a_window_is_the_most_that_a_token_sees():
    made = work(window=2)
    made.add_batch(batch(), trained=False)
    assert float(made.take()) == pytest.approx(5e6 + 9 + 0.001 * ((1 + 2 + 2) + (1 + 2)))


def test_generation_reads_each_prompt_once_and_not_the_last_token():
    ids = torch.tensor([[0, 5, 6], [0, 5, 6], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
    made = work()
    made.add_generation(ids, mask, torch.tensor([4, 1, 2]))
    # Read: 2 + 3 tokens, of the same prompt 0 more, 3 + 1; pairs of rows of 5, 2 and 4 tokens,
    # those of the prompt of two tokens once.
    tokens = 5 + 0 + 4
    pairs = 15 + (3 - 3) + 10
    assert float(made.take()) == tokens * 1e6 + (4 + 1 + 2) * 1e3 + pairs


def test_generation_under_a_window():
    made = work(window=2)
    one = torch.ones(1, 2, dtype=torch.long)
    made.add_generation(one, one, torch.tensor([3]))
    # A row of 4 tokens that see 1, 2, 2, 2.
    assert float(made.take()) == pytest.approx(4e6 + 3e3 + 10 + 0.001 * 7)


def test_adapters_and_heads_of_a_model_are_found():
    model = tiny_llama()
    shape = ModelShape.of(model.config.to_dict())
    assert PassWork.of(model, scalar=False).training == training_flops(shape)
    attach(model)
    with_values = training_flops(shape, with_values=True)
    assert PassWork.of(model, scalar=False).training == with_values
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(tiny_llama(), lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    found = PassWork.of(adapted, scalar=False).training
    assert found.token == training_flops(shape).token * 4 / 6 + 6 * trained


def test_a_model_without_a_formula_says_why():
    model = torch.nn.Linear(2, 2)
    assert PassWork.of(model, scalar=False).unknown
    other = torch.nn.Linear(2, 2)
    other.config = GPT2Config()
    found = PassWork.of(other, scalar=False)
    assert "gpt2" in found.unknown
    found.add_batch(batch(), trained=True)
    assert float(found.take()) == 0.0


def test_a_clock_adds_up_parts_and_may_be_held(monkeypatch):
    now = iter([0.0, 1.5, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock()
    for part in ("forward", "backward", "forward"):
        with clock.timed(part):
            pass
    clock.running = False
    with clock.timed("forward"):
        pass
    assert clock.take() == {"forward": 2.0, "backward": 2.0}
    assert clock.take() == {}


class Event:
    """A CUDA event by hand: over once the stream has come so far."""

    stream = 0
    marks = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.marks += 1
        self.at = Event.marks

    def query(self) -> bool:
        return self.at <= Event.stream

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query()
        return 1000.0 * (other.at - self.at)


def test_a_gpu_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.stream = 3
    clock = StepClock("cuda")
    for part in ("forward", "backward"):
        with clock.timed(part):
            pass
    assert clock.take() == {"forward": 1.0}  # the other is not over
    Event.stream = 4
    assert clock.take() == {"backward": 1.0}


def test_spans_of_a_gpu_that_nobody_asks_for_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.stream = 10**9
    clock = StepClock("cuda")
    for _ in range(1000):
        with clock.timed("forward"):
            pass
    assert len(clock._open) < 256 and clock.take() == {"forward": 1000.0}
