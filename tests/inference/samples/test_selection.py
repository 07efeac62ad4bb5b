"""Drawn responses on disk, their scores, and the rows that are chosen of them."""

import json
from dataclasses import replace

import pytest

from coati.dataset.rows.formats import read_row
from coati.inference.evaluate.generate_responses import Prompt
from coati.inference.evaluate.win_rate import Judge
from coati.inference.samples.sample_journal import RESPONSES, draw_all, prompt_key
from coati.inference.samples.samplers import Drawn
from coati.inference.samples.score_samples import SCORES, Scored, score_all
from coati.inference.samples.select_samples import (
    Group,
    Selection,
    best_of_n,
    best_of_table,
    groups,
    pairs,
    rejection,
)
from coati.rewards import Rewards

SETTINGS = {"temperature": 1.0, "model": {"config.json": "abc"}}


def prompts(count: int = 4) -> list[Prompt]:
    return [
        Prompt(f"f:{k}", k, [{"role": "user", "content": f"ask {k}"}], str(k)) for k in range(count)
    ]


def made(number: int, sample: int, text: str | None = None, stopped: bool = True) -> Drawn:
    text = f"{number}/{sample} \N{SNOWMAN}" if text is None else text
    message = {"role": "assistant", "content": text}
    return Drawn(number, sample, text, len(text), stopped, message)


class Engine:
    """Draws batches of two, and fails when it has drawn ``most``."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.asked = []

    def draw(self, wanted, keep) -> None:
        for start in range(0, len(wanted), 2):
            batch = wanted[start : start + 2]
            if len(self.asked) >= self.most:
                raise KeyboardInterrupt
            self.asked += [(one.prompt.number, one.sample) for one in batch]
            keep([made(one.prompt.number, one.sample) for one in batch])


def test_what_was_drawn_before_an_end_is_not_drawn_again(tmp_path):
    first = Engine(most=6)
    with pytest.raises(KeyboardInterrupt):
        draw_all(first, prompts(), 3, tmp_path, SETTINGS)
    second = Engine()
    found = draw_all(second, prompts(), 3, tmp_path, SETTINGS)
    whole = [(number, sample) for number in range(4) for sample in range(3)]
    assert first.asked + second.asked == whole
    assert found == {n: [made(n, s) for s in range(3)] for n in range(4)}
    third = Engine()
    assert draw_all(third, prompts(), 3, tmp_path, SETTINGS) == found and third.asked == []


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_was_cut_off_is_drawn_again_and_leaves_nothing(tmp_path, cut):
    draw_all(Engine(), prompts(), 2, tmp_path, SETTINGS)
    file = tmp_path / RESPONSES
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    again = Engine()
    draw_all(again, prompts(), 2, tmp_path, SETTINGS)
    assert again.asked == [(3, 1)] and file.read_bytes() == whole


def test_a_file_that_was_cut_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / RESPONSES).write_bytes(b'{"sett')
    engine = Engine()
    draw_all(engine, prompts(1), 1, tmp_path, SETTINGS)
    assert engine.asked == [(0, 0)]
    assert len((tmp_path / RESPONSES).read_text().splitlines()) == 2


def test_more_responses_are_drawn_behind_those_that_are_there(tmp_path):
    draw_all(Engine(), prompts(), 2, tmp_path, SETTINGS)
    more = Engine()
    draw_all(more, prompts(), 3, tmp_path, SETTINGS)
    assert more.asked == [(number, 2) for number in range(4)]
    fewer = Engine()
    found = draw_all(fewer, prompts(), 1, tmp_path, SETTINGS)
    assert fewer.asked == [] and found[2] == [made(2, 0)]


def test_other_settings_are_refused_by_name(tmp_path):
    draw_all(Engine(), prompts(), 1, tmp_path, SETTINGS)
    before = (tmp_path / RESPONSES).read_bytes()
    with pytest.raises(
        ValueError, match=r"--output_dir .*temperature 1\.0, now 0\.5; name another"
    ):
        draw_all(Engine(), prompts(), 1, tmp_path, SETTINGS | {"temperature": 0.5})
    assert (tmp_path / RESPONSES).read_bytes() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"settings": 1}', '{"number": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    draw_all(Engine(), prompts(), 1, tmp_path, SETTINGS)
    file = tmp_path / RESPONSES
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=RESPONSES):
        draw_all(Engine(), prompts(), 1, tmp_path, SETTINGS)


def test_prompts_are_known_by_what_they_ask_and_answer():
    one = prompts()[0]
    assert prompt_key(one) == prompt_key(replace(one, place="g:9", number=5))
    assert prompt_key(one) != prompt_key(replace(one, gt_answer="9"))
    assert prompt_key(one) != prompt_key(prompts()[1])


class Counting(Judge):
    """Scores by length, and what was asked of it."""

    def __init__(self, most: int = 99) -> None:
        super().__init__(rewards=Rewards(["length"]), batch_size=4)
        self.most = most
        self.batches = []

    def __call__(self, asked, responses, max_new_tokens):
        if len(self.batches) >= self.most:
            raise KeyboardInterrupt
        self.batches.append([(one.drawn.number, one.drawn.sample) for one in responses])
        found = super().__call__(asked, responses, max_new_tokens)
        return [
            None if one.text.startswith("1/1") else each
            for one, each in zip(responses, found, strict=True)
        ]


def scored(folder, judge, settings=SETTINGS):
    drawn = {n: [made(n, s) for s in range(2)] for n in range(4)}
    texts = dict.fromkeys(range(4), "asked")
    return score_all(judge, prompts(), drawn, texts, folder, settings, 50)


def test_scores_are_kept_and_groups_stay_together(tmp_path):
    first = Counting(most=1)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, first)
    second = Counting()
    found = scored(tmp_path, second)
    assert first.batches == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert second.batches == [[(2, 0), (2, 1), (3, 0), (3, 1)]]
    assert found[0][0].score == pytest.approx(-len(made(0, 0).text) / 50)
    assert found[0][0].parts == {"length": found[0][0].score} and found[0][0].prompt == "asked"
    assert found[1][1].score is None
    third = Counting()
    assert scored(tmp_path, third) == found and third.batches == []


def test_a_group_that_was_cut_off_is_scored_whole(tmp_path):
    whole = scored(tmp_path, Counting())
    file = tmp_path / SCORES
    file.write_bytes(file.read_bytes()[:-5])
    again = Counting()
    assert scored(tmp_path, again) == whole
    assert again.batches == [[(2, 0), (2, 1), (3, 0), (3, 1)]]
    assert len(file.read_text().splitlines()) == 9


class Ranking(Counting):
    """Each response's place among those to its prompt."""

    def __call__(self, asked, responses, max_new_tokens):
        super().__call__(asked, responses, max_new_tokens)
        of = [one.drawn.number for one in responses]
        return [(float(of[i:].count(n)), {}) for i, n in enumerate(of)]


def test_more_responses_to_a_prompt_are_scored_together_and_stay_so(tmp_path):
    texts = dict.fromkeys(range(4), "asked")

    def ranked(count, judge):
        drawn = {n: [made(n, s) for s in range(count)] for n in range(4)}
        found = score_all(judge, prompts(), drawn, texts, tmp_path, SETTINGS, 50)
        return [each.score for each in found[0]]

    assert ranked(2, Ranking()) == [2, 1]
    assert ranked(4, Ranking()) == [4, 3, 2, 1]
    again = Ranking()
    assert ranked(4, again) == [4, 3, 2, 1] and again.batches == []


def test_scores_of_another_judge_are_replaced(tmp_path):
    scored(tmp_path, Counting())
    again = Counting()
    scored(tmp_path, again, SETTINGS | {"judge": "other"})
    assert len(again.batches) == 2
    assert len((tmp_path / SCORES).read_text().splitlines()) == 9


def group(*rows: tuple[str, float | None], stopped: tuple[bool, ...] = ()) -> Group:
    ends = stopped or (True,) * len(rows)
    found = [
        Scored(made(0, k, text, end), "asked", score, {})
        for k, ((text, score), end) in enumerate(zip(rows, ends, strict=True))
    ]
    return Group.of(prompts()[0], found)


def said(rows: list[dict], key: str = "messages") -> list[str]:
    return [row[key][-1]["content"] for row in rows]


def test_the_best_and_those_above_a_threshold():
    one = group(("a", 1.0), ("b", 3.0), ("b", 3.0), ("c", 2.0), ("", 9.0), ("d", None))
    assert said(best_of_n(one, Selection())) == ["b"]
    assert said(rejection(one, Selection(threshold=2.0))) == ["b", "c"]
    assert said(rejection(one, Selection(threshold=0.0, keep=2))) == ["b", "c"]
    assert rejection(one, Selection(threshold=3.5)) == []


def test_of_equal_scores_the_first_is_the_best():
    assert said(best_of_n(group(("a", 1.0), ("b", 1.0)), Selection())) == ["a"]


def test_a_pair_is_the_best_and_the_worst_far_enough_apart():
    one = group(("a", 1.0), ("b", 3.0), ("c", 2.0))
    [row] = pairs(one, Selection(margin=2.0))
    assert said([row], "chosen") == ["b"] and said([row], "rejected") == ["a"]
    assert pairs(one, Selection(margin=2.1)) == []
    assert pairs(group(("a", 1.0), ("b", 1.0)), Selection()) == []
    assert pairs(group(("a", 1.0)), Selection()) == []


def test_what_ended_at_the_limit_is_not_learned_but_may_be_rejected():
    one = group(("a", 1.0), ("b", 3.0), ("c", 2.0), stopped=(False, False, True))
    assert said(best_of_n(one, Selection())) == ["c"]
    assert said(best_of_n(one, Selection(truncated=True))) == ["b"]
    [row] = pairs(one, Selection())
    assert said([row], "chosen") == ["c"] and said([row], "rejected") == ["a"]
    cut = group(("a", 1.0), ("b", 3.0), stopped=(False, False))
    assert best_of_n(cut, Selection()) == pairs(cut, Selection()) == []


def test_the_rows_are_read_as_what_they_are_trained_on():
    one = group(("a", 1.0), ("b", 3.0), ("d", None))
    [talk] = best_of_n(one, Selection())
    read = read_row("sft", json.loads(json.dumps(talk)))
    assert [message["content"] for message in read.messages] == ["ask 0", "b"]
    [pair] = pairs(one, Selection())
    read = read_row("preference", pair)
    assert (read.chosen[0]["content"], read.rejected[0]["content"]) == ("b", "a")
    [whole] = groups(one, Selection())
    assert whole["scores"] == [1.0, 3.0] and whole["gt_answer"] == "0"
    read = read_row("preference", whole)
    assert (read.chosen[0]["content"], read.rejected[0]["content"]) == ("b", "a")


def test_one_response_is_no_group():
    """No format takes a list of one for responses with scores."""
    alone = group(("a", 1.0), ("d", None))
    assert groups(alone, Selection()) == []
    assert said(best_of_n(alone, Selection())) == ["a"]


def test_thoughts_and_tools_are_in_the_rows():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    drawn = Drawn(0, 0, "<think>hm</think>yes", 4, True, message)
    asked = replace(prompts()[0], tools=[tool])
    [row] = best_of_n(Group.of(asked, [Scored(drawn, "asked", 1.0, {})]), Selection())
    assert row == {"messages": [*asked.messages, message], "tools": [tool]}
    read = read_row("sft", row)
    assert read.tools == [tool] and read.messages[-1]["reasoning_content"] == "hm"


def test_the_gain_of_the_best_of_k_by_hand():
    found = best_of_table([group(("a", 0.0), ("b", 1.0)), group(("a", 2.0), ("b", 2.0))])
    assert [(each.k, each.value, each.gain) for each in found] == [(1, 1.25, 0.0), (2, 1.5, 0.25)]
    assert found[1].gain_low == 0.0 and found[1].gain_high == 0.5
    assert best_of_table([group()]) == []
