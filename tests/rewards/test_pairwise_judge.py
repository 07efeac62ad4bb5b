"""A language model that judges pairs: what it is asked, in which orders, and what its verdicts make
of a group."""

import logging
import re
from dataclasses import replace

import pytest

from coati.rewards import endpoint, judge
from coati.rewards.responses import Responses
from coati.rewards.reward_options import PAIR_PATTERN, PAIR_PROMPT, PairJudgeOptions, RewardOptions
from coati.rewards.scorer import Rewards
from coati.rewards.source_rewards import SourceRewards
from coati.utils.logging import forget_warnings
from tests.rewards.endpoints import answering
from tests.rewards.test_judge import says


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint, "BACKOFF_S", (0.01,))
    monkeypatch.delenv(judge.KEY_VARIABLE, raising=False)
    forget_warnings()


def batch(*responses, size=2, truths=None):
    prompts = [f"q{row // size} {{response_a}}" for row in range(len(responses))]
    return Responses(prompts, list(responses), truths or [], num_generations=size)


def rewards(server, **options):
    made = PairJudgeOptions(server.url.replace("/score", "/v1"), "m", **options)
    options = RewardOptions(pairwise_judge=made)
    return Rewards(["pairwise_judge"], timeout=5.0, options=options)


def asked(body) -> tuple[str, str]:
    """The two responses, as ``A`` and ``B`` stand in a question of :data:`BARE`."""
    _, a, b = body["messages"][0]["content"].split("|")
    return a, b


BARE = "{prompt}|{response_a}|{response_b}"


def longer(number, body, headers):
    """A judge that prefers the longer one, in whichever place."""
    a, b = asked(body)
    return says("Better: tie" if len(a) == len(b) else f"Better: {'A' if len(a) > len(b) else 'B'}")


@pytest.mark.parametrize(
    ("verdict", "better"),
    [("Better: A", "A"), ("Neither is better: a tie.", None), ("Better: tie", "tie")],
)
def test_what_a_verdict_says(verdict, better):
    found = re.search(PAIR_PATTERN, verdict)
    assert (found and found[1]) == better


def test_both_orders_are_asked_and_places_in_responses_stay_text():
    with answering(longer) as server:
        found = rewards(server, prompt=BARE)(batch("{response_b}", "long long long", "x", "yy"))
        assert found.parts == {"pairwise_judge": [0.0, 1.0, 0.0, 1.0]}
        questions = sorted(body["messages"][0]["content"] for body in server.bodies)
    assert questions == [
        "q0 {response_a}|long long long|{response_b}",
        "q0 {response_a}|{response_b}|long long long",
        "q1 {response_a}|x|yy",
        "q1 {response_a}|yy|x",
    ]


def test_a_judge_that_prefers_a_place_finds_ties(caplog):
    with answering(lambda *_: says("I like it. Better: A")) as server:
        found = rewards(server)
        assert found(batch("one", "two")).total == [0.5, 0.5]
        assert "both orders" not in caplog.text
        caplog.set_level(logging.WARNING, "coati")
        found(batch(*(f"r{n}" for n in range(100))))
        assert "in 51 of 51 comparisons the judge preferred the same place" in caplog.text


def test_one_order_that_finds_a_tie_is_half_a_win():
    def answer(number, body, headers):
        return says("Better: tie" if asked(body)[0] == "one" else "**Better:** A")

    with answering(answer) as server:
        # one, two: a tie; two, one: two
        assert rewards(server, prompt=BARE)(batch("one", "two")).total == [0.25, 0.75]


def test_a_group_is_compared_with_all_of_its_own():
    with answering(longer) as server:
        found = rewards(server, prompt=BARE)(batch("a", "aaa", "aa", "b", "b", "bbbb", size=3))
        # a loses twice, aa once; the two b are equal, are not asked about, and lose to bbbb
        assert found.total == [0.0, 1.0, 0.5, 0.25, 0.25, 1.0]
        assert len(server.bodies) == 2 * 3 + 2, "equal questions are asked once"


def test_the_groups_of_a_source_stay_whole():
    made = batch("a", "aaa", "b", "bb", "cc", "c")
    made = replace(made, sources=["chat", "chat", "code", "code", "chat", "chat"])
    with answering(longer) as server:
        sets = {"chat": rewards(server, prompt=BARE), "code": Rewards(["length"])}
        found = SourceRewards(sets)(replace(made, max_new_tokens=10, lengths=[1, 2, 3, 4, 5, 6]))
    assert found.total == [0.0, 1.0, -0.3, -0.4, 1.0, 0.0]


@pytest.mark.parametrize(
    ("verdict", "total"),
    [
        ("Better: B? No: better: A", [0.5, 0.5]),  # the last counts; A in both orders
        ("A is better. Better: tie", [0.5, 0.5]),
        ("Better: neither\nBetter: tie.", [0.5, 0.5]),
    ],
)
def test_the_last_verdict_counts(verdict, total):
    with answering(lambda *_: says(verdict)) as server:
        assert rewards(server)(batch("one", "two")).total == total


def test_another_pattern_reads_another_verdict():
    def answer(number, body, headers):
        return says('{"winner": "a"}' if asked(body)[0] == "two" else '{"winner": "B"}')

    with answering(answer) as server:
        found = rewards(server, prompt=BARE, pattern=r'"winner": "(\w+)"')
        assert found(batch("one", "two")).total == [0.0, 1.0]


def test_no_verdict_is_an_error_or_what_the_flag_says(caplog):
    with answering(lambda *_: says("Both have merits.")) as server:
        with pytest.raises(ValueError, match="reward pairwise_judge .*--judge_failed SCORE"):
            rewards(server)(batch("one", "two"))
        caplog.set_level(logging.WARNING, "coati")
        assert rewards(server, failed=0.5)(batch("one", "two")).total == [0.5, 0.5]
    assert "reward pairwise_judge gave 3 verdicts without a score" in caplog.text


def test_a_single_response_is_refused():
    with answering(longer) as server:
        with pytest.raises(ValueError, match="of which there is one; take judge"):
            rewards(server)(batch("one", "two", size=1))
        assert not server.bodies


def test_ground_truths_and_what_a_prompt_must_have():
    with answering(longer) as server:
        found = rewards(server, prompt="{response_a}{response_b}{gt_answer}")
        assert found.needs_gt_answer
        with pytest.raises(ValueError, match="which this row has not"):
            found(batch("one", "two"))
    for prompt in ("{response}", "{response_a}", "{response_b} {prompt}"):
        with pytest.raises(ValueError, match=r"the text has no \{response_[ab]\}"):
            PairJudgeOptions("http://h/v1", "m", prompt=prompt)
    assert PairJudgeOptions("http://h/v1", "m").places == {"prompt", "response_a", "response_b"}
    assert "Better: tie" in PAIR_PROMPT


def test_verdicts_are_kept():
    with answering(longer) as server:
        first = rewards(server, prompt=BARE)(batch("one", "three")).total
        count = len(server.bodies)
        assert rewards(server, prompt=BARE)(batch("one", "three")).total == first
        assert len(server.bodies) == count == 2
