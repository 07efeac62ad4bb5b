"""Dialogues whose responses come from rollout servers, and rewards that wait for something else."""

import asyncio

import pytest
import torch
from torch.testing import assert_close

from coati.environments.multi_turn import Environment, Turn
from coati.environments.turn_tokens import TurnTokens
from coati.experience_maker.rollouts.dialogue_rollout import EnvironmentRollout, TurnLimits
from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.experience_maker.rollouts.rollout_engine import ModelRollout
from coati.experience_maker.scoring import Scorer
from coati.models.generation.loop import Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.rewards.scorer import Rewards
from tests.dataset.chat.call_templates import conversation_of
from tests.environments.test_environment_rollout import QUESTION, batch_of, maker_of, two_and_one
from tests.experience_maker.rollout_servers import FakeEngine, http_rollout, serving
from tests.tiny import tiny_llama

CONVERSATION = conversation_of("qwen2_5")
STOPS = [list(stop) for stop in CONVERSATION.stop_ids]
# Every other text ends a turn, so that a random policy has some.
ENDS = STOPS + [[token] for token in range(0, len(CONVERSATION.tokenizer), 2)]
TOKENS = 48
LENGTH = 400


class Echo(Environment):
    """Says how long the response was; the reward is of the seed and the turn."""

    def reset(self, row):
        self.row = row
        self.turn = 0
        return row["messages"]

    def step(self, response):
        self.turn += 1
        said = {"role": "user", "content": f"{len(response['content'])}?"}
        return Turn([said], reward=self.turn + self.row["seed"] % 7)


def policy():
    return tiny_llama(seed=1, vocab_size=len(CONVERSATION.tokenizer))


def dialogues(rollout, model):
    """Three samples of up to three turns, whose responses are ``rollout``'s."""
    environment = EnvironmentRollout(
        FakeEngine(model),
        rollout,
        Echo,
        TurnTokens(CONVERSATION, ENDS),
        TurnLimits(turns=3, tokens=TOKENS, prompt=LENGTH - TOKENS),
        pad_token_id=0,
    )
    noise = NoiseRows(5, 3, [4, 9, 2])
    samples = environment.begin([{"messages": [QUESTION], "gt_answer": None}] * 3, 1, noise)
    return environment.run(samples, noise, 0.8)


def own_rollout(model):
    rollout = ModelRollout(
        FakeEngine(model),
        sampling=Sampling(),
        stop_sequences=ENDS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
    )
    rollout.publish(7, ())
    return rollout


@pytest.mark.parametrize("count", [1, 2])
def test_turns_over_http_are_those_of_this_process(tmp_path, count):
    model = policy()
    expected = dialogues(own_rollout(model), model)
    assert expected.of_environment["turns"].max() > 1 and not expected.action_mask.all()
    first = [tiny_llama(vocab_size=len(CONVERSATION.tokenizer)) for _ in range(count)]
    with serving(*first) as servers:
        rollout = http_rollout(
            FakeEngine(model),
            [server.url for server in servers],
            tmp_path,
            stops=ENDS,
            count=TOKENS,
            max_length=LENGTH,
        )
        rollout.publish(7, model.state_dict().items())
        found = dialogues(rollout, model)
        rollout.close()
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.action_mask.tolist() == expected.action_mask.tolist()
    assert found.stopped.tolist() == expected.stopped.tolist() and found.version == 7
    for name, values in expected.of_environment.items():
        assert found.of_environment[name].tolist() == values.tolist(), name
    assert found.logprobs is None and expected.sampled_logprobs is None
    assert_close(found.sampled_logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_servers_that_are_lost_between_two_turns_end_the_run_as_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("coati.experience_maker.rollouts.remote_rollout.LOOK_S", 0.05)
    model = policy()
    with serving(model) as [server]:
        rollout = http_rollout(
            FakeEngine(model),
            [server.url],
            tmp_path,
            stops=ENDS,
            count=TOKENS,
            max_length=LENGTH,
            timeout=0.5,
        )
        rollout.publish(0, model.state_dict().items())
        asked = []

        def ask(*given, **named):
            asked.append(given)
            if len(asked) == 2:
                server.stop()
            return type(rollout).ask(rollout, *given, **named)

        monkeypatch.setattr(rollout, "ask", ask)
        with pytest.raises(RolloutsLost, match="no rollout server has worked for 0.5 s"):
            dialogues(rollout, model)
        assert len(asked) == 2
        rollout.close()


async def slow(responses):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in responses]


def slowly_judged():
    """Makes two batches of two samples."""
    script, first = two_and_one()
    _, second = two_and_one()
    waiting = [first, first, second, second]
    maker = maker_of(script, lambda: waiting.pop(0)(), num_generations=2)
    maker.scorer = Scorer(None, Rewards(["python:slow"], given={"python:slow": slow}))
    assert maker.scores_beside
    return maker


def test_rewards_that_wait_are_added_to_those_of_the_environment():
    """Begun of two batches before either is finished, as of one after the other."""
    maker = slowly_judged()
    begun = [maker.begin_experience(maker.ask(batch_of(1), [0, 1], 0)) for _ in range(2)]
    found = [maker.finish_experience(batch) for batch in begun]
    maker = slowly_judged()
    others = [maker.make_experience(maker.ask(batch_of(1), [0, 1], 0)) for _ in range(2)]
    for one, other in zip(found, others, strict=True):
        length = len("A bird.")
        assert one.experience.reward.tolist() == [length + 1.0, length]
        assert one.reward_parts["environment"].tolist() == [1.0, 0.0]
        assert one.reward_parts["slow"].tolist() == [length, length]
        for name, tensor in one.experience.tensors().items():
            assert torch.equal(tensor, getattr(other.experience, name)), name
