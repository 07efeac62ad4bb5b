"""Samples of several turns: who says what, which tokens count, what the limits cut, and what is
told of an environment that is wrong."""

import time

import pytest
import torch
from torch.testing import assert_close

from coati.environments.multi_turn import Turn
from coati.environments.turn_tokens import UNREADABLE
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.rollouts import dialogue_rollout
from coati.experience_maker.rollouts.pending_rollouts import PendingRollouts
from coati.experience_maker.scoring import no_scores
from coati.models.generation.row_noise import NoiseRows, row_noise
from tests.dataset.chat.call_templates import conversation_of
from tests.environments.scripted import ScriptedPolicy, Told, rollout_of, tool
from tests.experience_maker.stubs import StubEngine, log_probs

CONVERSATION = conversation_of("qwen2_5")
STOPS = [list(stop) for stop in CONVERSATION.stop_ids]
TOOLS = [tool()]
QUESTION = {"role": "user", "content": "What is a heron?"}
FOUND = {"role": "tool", "name": "lookup", "content": "a bird"}
ROW = {"messages": [QUESTION], "tools": None, "gt_answer": "bird"}


def ids_of(text: str, ends: bool = True) -> list[int]:
    ids = CONVERSATION.encoder.encode_inside(text)
    return ids + STOPS[0] if ends else ids


ASKS = ids_of('<tool_call>\n{"name": "lookup", "arguments": {"word": "heron"}}\n</tool_call>')
BROKEN = ids_of('<tool_call>\n{"name": "lookup", "argu')
SAYS = ids_of("A bird.")


def sampled(script, environments, rows=1, count=1, **limits):
    """The samples, what was generated, and the policy that was asked."""
    policy = ScriptedPolicy(dict(enumerate(script)), STOPS)
    waiting = list(environments)
    rollout = rollout_of(CONVERSATION, STOPS, policy, lambda: waiting.pop(0), **limits)
    noise = NoiseRows(1, 0, list(range(len(script))))
    samples = rollout.begin([ROW] * rows, count, noise)
    return samples, rollout.run(samples, noise, 1.0), policy


def test_two_turns():
    environment = Told([Turn([FOUND], reward=0.25), Turn(reward=1.0, done=True)], TOOLS)
    (sample,), found, policy = sampled([[ASKS, SAYS]], [environment])
    assert environment.heard[0]["tool_calls"][0]["function"] == {
        "name": "lookup",
        "arguments": {"word": "heron"},
    }
    assert environment.heard[1] == {"role": "assistant", "content": "A bird."}
    assert environment.row["gt_answer"] == "bird" and isinstance(environment.row["seed"], int)
    between = len(sample.ids) - len(ASKS) - len(SAYS)
    assert between > 0
    own = [True] * len(ASKS) + [False] * between + [True] * len(SAYS)
    assert found.action_mask.tolist() == [own] and found.lengths.tolist() == [len(own)]
    assert found.responses() == [sample.ids] and found.stopped.tolist() == [True]
    # Log-probs lie where their tokens do: the scripted policy's are the places of the tokens.
    places = -torch.arange(len(sample.prompt), len(sample.prompt) + len(own)).float()
    assert_close(found.logprobs[0], places * torch.tensor(own))
    known = {name: values.tolist() for name, values in found.of_environment.items()}
    assert known == {
        "turns": [2.0],
        "tool_calls": [1.0],
        "failed_calls": [0.0],
        "unreadable_calls": [0.0],
        "cut": [0.0],
        "reward": [1.25],
        "last_start": [len(ASKS) + between],
    }
    assert [turn for _, _, turn in policy.asked] == [0, 1]
    assert policy.asked[1][1] == [4000 - len(ASKS) - between]


def test_rows_that_are_over_leave():
    short = [Told([Turn(done=True)], TOOLS) for _ in range(2)]
    long = Told([Turn([FOUND]), Turn([FOUND]), Turn(done=True)], TOOLS)
    script = [[SAYS], [ASKS, ASKS, SAYS], [SAYS]]
    samples, found, policy = sampled(script, [short[0], long, short[1]], rows=3)
    assert [rows for rows, _, _ in policy.asked] == [[0, 1, 2], [1], [1]]
    assert found.of_environment["turns"].tolist() == [1, 3, 1]
    alone, of_one, _ = sampled(
        [[ASKS, ASKS, SAYS]], [Told([Turn([FOUND]), Turn([FOUND]), Turn(done=True)], TOOLS)]
    )
    assert alone[0].ids == samples[1].ids
    assert found.action_mask[1].tolist() == of_one.action_mask[0].tolist()


def test_a_broken_call_is_told_to_the_policy_and_counted():
    environment = Told([Turn(reward=1.0, done=True)], TOOLS)
    (sample,), found, policy = sampled([[BROKEN, SAYS]], [environment])
    assert [one["content"] for one in environment.heard] == ["A bird."]
    assert UNREADABLE in CONVERSATION.encoder.decode(policy.prompts[1][0])
    known = found.of_environment
    assert known["unreadable_calls"].tolist() == [1] and known["tool_calls"].tolist() == [0]
    assert known["reward"].tolist() == [1] and known["turns"].tolist() == [2]


@pytest.mark.parametrize("said", [ASKS, BROKEN])
def test_one_that_never_ends_is_cut_at_its_turns(said):
    environment = Told([Turn([FOUND], reward=0.5)] * 9, TOOLS)
    (sample,), found, policy = sampled([[said] * 9], [environment], turns=3)
    assert len(policy.asked) == 3 and found.of_environment["turns"].tolist() == [3]
    assert found.stopped.tolist() == [False] and found.of_environment["cut"].tolist() == [1]
    assert sample.ids[-len(said) :] == said  # nothing is put behind the last response
    assert sample.reward == (1.5 if said is ASKS else 0.0)


def test_one_that_never_ends_is_cut_at_its_tokens():
    for tokens in (len(ASKS) + 1, 2 * len(ASKS) + 9, 200):
        environment = Told([Turn([FOUND])] * 40, TOOLS)
        (sample,), found, policy = sampled([[ASKS] * 40], [environment], tokens=tokens, turns=40)
        assert len(sample.ids) <= tokens and found.of_environment["cut"].tolist() == [1]
        assert found.stopped.tolist() == [False] and sample.own[-1]
        assert all(0 < most <= tokens for _, limits, _ in policy.asked for most in limits)


def test_a_response_cut_at_the_limit_is_not_answered():
    environment = Told([], TOOLS)
    (sample,), found, _ = sampled([[ids_of("A b", ends=False)]], [environment], tokens=3)
    assert not environment.heard and found.of_environment["cut"].tolist() == [1]
    assert found.of_environment["reward"].tolist() == [0]


class Raises(Told):
    def step(self, response):
        raise KeyError("heron")


class Sleeps(Told):
    def step(self, response):
        time.sleep(5)


WRONG = {
    "raises": (Raises([], TOOLS), "step raised KeyError: 'heron'"),
    "too slow": (Sleeps([], TOOLS), "step took longer than 0.2 s"),
    "no turn": (Told([None], TOOLS), "step returned None; expected a Turn"),
    "nothing said": (Told([Turn([])], TOOLS), r"step returned the messages \[\]"),
    "no list": (Told([Turn("hello")], TOOLS), "step returned the messages 'hello'"),
    "its own words": (
        Told([Turn([{"role": "assistant", "content": "x"}])], TOOLS),
        "roles user, tool",
    ),
    "no text": (Told([Turn([{"role": "user", "content": 5}])], TOOLS), "expected a list of"),
    "reward": (Told([Turn(reward=float("nan"), done=True)], TOOLS), "the reward nan"),
    "word": (Told([Turn(reward="much", done=True)], TOOLS), "the reward 'much'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_environment_is_said_with_its_row(case):
    environment, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        sampled([[ASKS, SAYS]], [environment], seconds=0.2)
    assert "the row whose last message is 'What is a heron?', gt_answer 'bird'" in str(caught.value)


def test_a_result_needs_a_call():
    with pytest.raises(ValueError, match="answers a response that calls nothing with a tool's"):
        sampled([[SAYS, SAYS]], [Told([Turn([FOUND])], TOOLS)])


class Begins(Told):
    def __init__(self, messages):
        super().__init__([Turn(done=True)] * 2)
        self.messages = messages

    def reset(self, row):
        return self.messages


def test_how_a_dialogue_may_begin():
    for messages in (None, [], [{"role": "user"}], [{"role": "assistant", "content": "x"}]):
        with pytest.raises(ValueError, match="reset returned the messages"):
            sampled([[SAYS]], [Begins(messages)])
    with pytest.raises(ValueError, match="at most 9 leave room for the response"):
        sampled([[SAYS]], [Begins([QUESTION])], prompt=9)
    other = {"role": "user", "content": "What is an egret?"}
    with pytest.raises(ValueError, match="reset begins another dialogue for the same row"):
        sampled([[SAYS], [SAYS]], [Begins([QUESTION]), Begins([other])], count=2)
    sampled([[SAYS], [SAYS]], [Begins([QUESTION]), Begins([other])], rows=2)


def test_turns_of_several_weights_are_refused():
    class Moves(ScriptedPolicy):
        def ask(self, *given, noise, **named):
            self.version = noise.turn
            return super().ask(*given, noise=noise, **named)

    environment = Told([Turn([FOUND]), Turn(done=True)], TOOLS)
    policy = Moves({0: [ASKS, SAYS]}, STOPS)
    rollout = rollout_of(CONVERSATION, STOPS, policy, lambda: environment)
    noise = NoiseRows(1, 0, [0])
    with pytest.raises(ValueError, match="of the weights of 0 and 1, not of one"):
        rollout.run(rollout.begin([ROW], 1, noise), noise, 1.0)


def test_a_rank_whose_samples_are_over_asks_for_one_token_behind_a_prompt(monkeypatch):
    """As long as another rank has some: behind a whole sample there may be no position left."""
    others = iter([True, True, False])
    monkeypatch.setattr(dialogue_rollout, "any_rank", lambda mine: next(others))
    environment = Told([Turn(done=True)], TOOLS)
    (sample,), found, policy = sampled([[SAYS, SAYS]], [environment])
    assert policy.asked == [([0], [4000], 0), ([0], [1], 1)]
    assert policy.prompts == [[sample.prompt], [sample.prompt]]
    assert found.responses() == [SAYS] and found.of_environment["turns"].tolist() == [1]


def test_each_turn_has_noise_of_its_own():
    first = row_noise(3, 2, [7, 8], 5)
    assert torch.equal(NoiseRows(3, 2, [7, 8]).noise(5), first)
    later = NoiseRows(3, 2, [7, 8], turn=1)
    assert not torch.equal(later.noise(5), first)
    assert torch.equal(later.select(slice(1, 2)).noise(3), later.noise(5)[1:, :3])
    assert not torch.equal(row_noise(3, 2, [7], 5, 2), row_noise(3, 2, [7], 5, 1))


# In the experience


def maker_of(script, make, method="rloo", critic=None, **settings):
    policy = ScriptedPolicy(script, STOPS)
    given = {"max_new_tokens": 4000, "stop_sequences": STOPS, "whiten": False, "lam": 1.0}
    actor = StubEngine(log_probs(-0.25))
    made = NaiveExperienceMaker(
        actor,
        policy,
        no_scores,
        CONVERSATION.tokenizer,
        ExperienceSettings(**given, method=method, **settings),
        critic=critic,
        environment=rollout_of(CONVERSATION, STOPS, policy, make),
    )
    return made


def batch_of(rows: int) -> dict:
    import json

    return {
        "input_ids": torch.ones(rows, 2, dtype=torch.long),
        "attention_mask": torch.ones(rows, 2, dtype=torch.long),
        "gt_answer": ["bird"] * rows,
        "dialogue": [json.dumps({"messages": [QUESTION], "tools": None})] * rows,
    }


def two_and_one():
    """The first sample calls a tool and is right, the second answers at once and is not."""
    waiting = [
        Told([Turn([FOUND], reward=0.25), Turn(reward=0.75, done=True)], TOOLS),
        Told([Turn(done=True)], TOOLS),
    ]
    return {0: [ASKS, SAYS], 1: [SAYS]}, lambda: waiting.pop(0)


@pytest.mark.parametrize("size", [None, 1])
def test_group_advantages_and_metrics_count_the_policys_tokens_alone(size):
    script, make = two_and_one()
    maker = maker_of(script, make, num_generations=2, rollout_batch_size=size)
    found = maker.make_experience(maker.ask(batch_of(1), [0, 1], 0))
    one = found.experience
    policys = [len(ASKS) + len(SAYS), len(SAYS)]
    assert one.action_mask.sum(1).tolist() == policys
    assert found.samples["response_length"].tolist() == policys
    assert one.response_lengths()[0] > policys[0]
    assert one.reward.tolist() == [1.0, 0.0]
    assert found.samples["reward/environment"].tolist() == [1.0, 0.0]
    assert found.samples["environment/turns"].tolist() == [2.0, 1.0]
    # rloo: r less the other's
    expected = torch.tensor([[1.0], [-1.0]]) * one.action_mask
    assert_close(one.advantages, expected)
    assert not one.action_log_probs[~one.action_mask].any()
    assert (one.labels() != -100).sum(1).tolist() == policys
    # Reward functions see the last response.
    assert found.responses.responses == ["A bird.", "A bird."]
    assert "What is a heron?" in found.responses.prompts[0]
    assert found.responses.gt_answers == ["bird", "bird"]


def test_gae_of_a_sample_with_a_tool_by_hand():
    """V is a tenth of the place, gamma 1, lambda 1: the advantage of each action is the reward less
    its value, across the hole too."""

    def position(batch):
        return torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) / 10

    script, make = two_and_one()
    maker = maker_of({0: script[0]}, make, method=None, critic=StubEngine(position))
    found = maker.make_experience(maker.ask(batch_of(1), [0], 0))
    one = found.experience
    own = one.action_mask[0]
    states = torch.arange(one.prompt_width - 1, one.prompt_width - 1 + one.num_actions) / 10
    assert_close(one.values[0], states * own)
    assert_close(one.returns[0], own.float())
    assert_close(one.advantages[0], (1 - states) * own)


def test_what_was_asked_for_outlives_a_checkpoint():
    script, make = two_and_one()
    maker = maker_of(script, make, num_generations=2)
    pending = maker.ask(batch_of(1), [0, 1], 0)
    again = PendingRollouts.of_state(pending.state_dict(), torch.device("cpu"))
    first = maker.make_experience(pending)
    second = maker.make_experience(again)
    for name, tensor in first.experience.tensors().items():
        assert torch.equal(tensor, getattr(second.experience, name)), name
    assert first.samples.keys() == second.samples.keys()
    assert second.responses == first.responses
