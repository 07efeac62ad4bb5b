"""Cleaning on sets whose right answer is known: what goes, what stays, and under which reason it is
counted."""

import json
from pathlib import Path

import pytest

from coati.dataset.clean.cleaning import Cleaning, check_row
from coati.dataset.clean.text_normalization import ngram_hashes, normalize, word_hashes, words
from coati.dataset.prepare.shard_plan import EvaluationShare
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from tests.dataset.prepare.test_prepare import lines, row, run, write

LONG = (
    "the quick brown fox jumps over the lazy dog while seven calm owls watch from an old oak tree "
    "at night"
)


def questions(folder: Path, below: str = ".") -> list[str]:
    """The first line of the user in every row written, in order."""
    shards = lines(folder) if below == "." else lines_of(folder / "jsonl" / below)
    return [
        made["inputs_decode"].split("user\n")[1].split("<|im_end|>")[0]
        for shard in shards
        for made in shard
    ]


def lines_of(folder: Path) -> list[list[dict]]:
    return [
        [json.loads(line) for line in open(path)] for path in sorted(folder.glob("part-*.jsonl"))
    ]


def test_texts_in_normal_form():
    assert (
        normalize(" Ｈello\u00a0 WÖRLD \n ﬁne ")
        == "hello wörld fine"
        == normalize("hello wo\u0308rld fine")
    )
    assert words("Don't  stop: ＡＢＣ-42!") == ["don", "t", "stop", "abc", "42"]
    assert (
        words("我爱 Python，你呢？") == ["我", "爱", "python", "你", "呢"] and words("...!") == []
    )


def test_grams_are_equal_where_the_words_are():
    one, other = (word_hashes(words(text)) for text in ("a b c d e", "x b c d y"))
    assert len(ngram_hashes(one, 3)) == 3 and len(ngram_hashes(one, 6)) == 0
    assert [int(found) in ngram_hashes(other, 3).tolist() for found in ngram_hashes(one, 3)] == [
        False,
        True,
        False,
    ]
    assert set(ngram_hashes(one, 2).tolist()).isdisjoint(ngram_hashes(one, 3).tolist())


def test_exact_duplicates_are_found_whatever_their_case_width_and_blanks(tmp_path):
    rows = [
        row("What is this?", "A house."),
        row("what  IS this?", "a house."),  # case and blanks
        row("What is this?", "A home."),
        row("Ｗhat is this?\n", "A ｈouse."),  # width
        row("What is this?", "A house.", "And this?", "A tree."),  # longer
        row("A house.", "What is this?"),
        row("What is this?", "A home."),
    ]
    data, more = write(tmp_path / "a.jsonl", *rows[:3]), write(tmp_path / "b.jsonl", *rows[3:], "{")
    report = run(
        tmp_path, data, more, num_bins=3, cleaning=Cleaning(deduplicate=True), max_bad_ratio=1
    )
    entry = report["dropped"]["duplicate"]
    assert entry["rows"] == 3 and report["rows_kept"] == 4 and report["rows_dropped"] == 4
    assert entry["first"] == [
        f"{data}:2: the text is that of {data}:1",
        f"{more}:1: the text is that of {data}:1",
        f"{more}:4: the text is that of {data}:3",
    ]
    assert questions(tmp_path) == ["What is this?", "What is this?", "What is this?", "A house."]


def test_any_number_of_processes_and_bins_drops_the_same_rows(tmp_path):
    data = write(tmp_path / "a.jsonl", *[row(f"q{i % 97}", f"a{i % 97}") for i in range(400)])
    cleaning = Cleaning(deduplicate=True)
    one, two = (
        run(tmp_path / str(n), data, num_proc=n, num_bins=b, cleaning=cleaning)
        for n, b in ((1, 1), (2, 5))
    )
    assert one["dropped"] == two["dropped"] and one["rows_kept"] == 97
    assert questions(tmp_path / "1") == questions(tmp_path / "2") == [f"q{i}" for i in range(97)]


def test_a_row_twice_in_both_splits_stays_in_the_evaluation_split(tmp_path):
    data = write(
        tmp_path / "a.jsonl", row("one", "1"), row("two", "2"), row("ONE", "1"), row("three", "3")
    )
    held = write(tmp_path / "e.jsonl", row("Two", "2"), row("four", "4"), row("two ", "2"))
    report = run(
        tmp_path, data, eval_inputs=[held], cleaning=Cleaning(deduplicate=True), num_bins=2
    )
    assert questions(tmp_path) == ["one", "three"] and questions(tmp_path, "eval") == [
        "Two",
        "four",
    ]
    assert report["dropped"]["duplicate"]["first"] == [
        f"{data}:2: the text is that of {held}:1",
        f"{data}:3: the text is that of {data}:1",
    ]
    assert report["evaluation"]["rows_dropped"] == 1 and report["evaluation"]["rows_read"] == 3


@pytest.mark.parametrize("seed", range(3))
def test_no_evaluation_row_has_a_duplicate_among_those_trained_on(seed, tmp_path):
    """Every text stands three times in the input, so chance alone would put most of them into both
    splits."""
    data = write(
        tmp_path / "a.jsonl", *[row(f"question {i % 40}", f"answer {i % 40}") for i in range(120)]
    )
    cleaning = Cleaning(deduplicate=True)
    report = run(tmp_path, data, eval_ratio=0.25, seed=seed, cleaning=cleaning, num_bins=2)
    train, evaluation = questions(tmp_path), questions(tmp_path, "eval")
    assert not set(train) & set(evaluation) and len(train) + len(evaluation) == 40
    assert sorted(train + evaluation) == sorted({f"question {i}" for i in range(40)})
    assert (
        report["rows_read"] + report["evaluation"]["rows_read"] == 120
        and report["evaluation"]["rows_read"] == 30
    )
    run(tmp_path / "kept", data, eval_ratio=0.25, seed=seed, num_bins=2)
    assert set(questions(tmp_path / "kept")) & set(questions(tmp_path / "kept", "eval"))


def test_the_evaluation_split_depends_on_seed_and_row_alone(tmp_path):
    data = write(tmp_path / "a.jsonl", *[row(f"q{i}", "a") for i in range(50)])
    drawn = {}
    for name, settings in {
        "a": {},
        "bins": {"num_bins": 1},
        "workers": {"num_proc": 2},
        "seed": {"seed": 1},
    }.items():
        run(tmp_path / name, data, **{"eval_ratio": 0.1, "num_bins": 4, **settings})
        drawn[name] = questions(tmp_path / name, "eval")
        assert sorted(drawn[name] + questions(tmp_path / name)) == sorted(
            f"q{i}" for i in range(50)
        )
    assert drawn["a"] == drawn["bins"] == drawn["workers"] != drawn["seed"] and len(drawn["a"]) == 5


@pytest.mark.parametrize(
    ("ratio", "total", "rows"), [(0.1, 50, 5), (0.01, 12, 1), (0.5, 3, 2), (0.9, 1000, 900)]
)
def test_the_share_is_exact_and_at_least_one_row(ratio, total, rows):
    share = EvaluationShare(ratio, total, seed=5)
    whole = share.chosen(0, total)
    assert whole.sum() == rows
    assert [bool(share.chosen(i, i + 1)[0]) for i in range(total)] == whole.tolist()


def test_near_duplicates_go_above_the_threshold_alone(tmp_path):
    pytest.importorskip("datasketch")
    tale = " ".join(f"word{i}" for i in range(60))
    rows = [
        row(tale, "yes"),
        row(
            tale.replace("word30", "other"), "yes"
        ),  # 3 of 59 + 3 trigrams differ on either side: 0.90
        row(
            tale.replace("word10", "x").replace("word30", "y").replace("word50", "z"), "yes"
        ),  # 50 of 68: 0.74
        row(" ".join(f"else{i}" for i in range(60)), "yes"),
        row(tale.upper() + "!", "YES"),  # the same but for case and punctuation
        row("hi", "there"),
        row("?", "!"),  # no word at all
        row("!", "?"),
    ]
    data = write(tmp_path / "a.jsonl", *rows)
    report = run(tmp_path / "high", data, num_bins=2, cleaning=Cleaning(near_duplicates=0.82))
    assert report["dropped"]["near_duplicate"]["first"] == [
        f"{data}:2: the text is close to that of {data}:1",
        f"{data}:5: the text is close to that of {data}:1",
    ]
    low = run(
        tmp_path / "low", data, num_bins=2, num_proc=2, cleaning=Cleaning(near_duplicates=0.6)
    )
    assert [text.split(":")[1] for text in low["dropped"]["near_duplicate"]["first"]] == [
        "2",
        "3",
        "5",
    ]
    assert low["rows_kept"] == 5
    held = write(tmp_path / "e.jsonl", row(tale.replace("word7", "seven"), "yes"))
    leak = run(
        tmp_path / "e",
        data,
        eval_inputs=[held],
        num_bins=1,
        cleaning=Cleaning(near_duplicates=0.82),
    )
    assert {text.split(": ")[1] for text in leak["dropped"]["near_duplicate"]["first"]} == {
        f"the text is close to that of {held}:1"
    }
    assert leak["evaluation"]["rows_kept"] == 1


def test_training_rows_that_share_words_in_a_row_with_an_evaluation_row_go(tmp_path):
    shared = " ".join(LONG.split()[3:16])  # 13 words
    twelve = " ".join(LONG.split()[3:15])
    rows = [
        row(f"Well, {shared.upper()}, or so", "fine"),
        row(f"Well, {twelve}, or so", "fine"),
        row("tell me", f"they say {shared}"),
        row("Where is Rome?", "Italy"),  # the whole question of an evaluation row
        row("Where is Rome?", "In Italy", "And Paris?", "France"),  # the question goes on here
        row("so where is Rome?", "Italy"),
    ]
    data = write(tmp_path / "a.jsonl", *rows)
    held = write(tmp_path / "e.jsonl", row(LONG, "yes"), row("where is rome", "in Italy, I think"))
    cleaning = Cleaning(drop_eval_overlap=True)
    report = run(tmp_path, data, eval_inputs=[held], num_bins=2, cleaning=cleaning)
    assert report["dropped"]["eval_overlap"]["first"] == [
        f"{data}:1: {held}:1 holds {shared!r} too",
        f"{data}:3: {held}:1 holds {shared!r} too",
        f"{data}:4: {held}:2 holds 'where is rome' too",
    ]
    assert report["rows_kept"] == 3 and report["evaluation"]["rows_kept"] == 2
    twelve_words = Cleaning(drop_eval_overlap=True, overlap_words=12)
    assert (
        run(tmp_path / "12", data, eval_inputs=[held], cleaning=twelve_words)["dropped"][
            "eval_overlap"
        ]["rows"]
        == 4
    )


def test_overlap_with_an_evaluation_share_leaves_none(tmp_path):
    data = write(
        tmp_path / "a.jsonl",
        *[row(f"{LONG} {'and so on ' * (i % 7)}", f"answer {i}") for i in range(40)],
    )
    rest = write(tmp_path / "b.jsonl", *[row(f"short {i}", "a") for i in range(40)])
    report = run(
        tmp_path, data, rest, eval_ratio=0.2, num_bins=3, cleaning=Cleaning(drop_eval_overlap=True)
    )
    kept = questions(tmp_path)
    assert any(text.startswith("the quick") for text in questions(tmp_path, "eval"))
    assert kept and not any(text.startswith("the quick") for text in kept)
    assert (
        report["rows_kept"]
        == len(kept)
        == 40 - sum(t.startswith("short") for t in questions(tmp_path, "eval"))
    )


def test_a_system_message_that_all_rows_share_is_no_overlap(tmp_path):
    system = {"from": "system", "content": LONG}
    rows = [{"messages": [system, *row(f"q{i}", "a")["messages"]]} for i in range(10)]
    data, held = write(tmp_path / "a.jsonl", *rows[:5]), write(tmp_path / "e.jsonl", *rows[5:])
    report = run(
        tmp_path, data, eval_inputs=[held], num_bins=1, cleaning=Cleaning(drop_eval_overlap=True)
    )
    assert report["rows_dropped"] == 0


def test_a_benchmark_of_any_keys_is_kept_out(tmp_path):
    benchmark = write(
        tmp_path / "bench.jsonl",
        {"id": 7, "task": {"q": LONG, "choices": ["Paris", "Rome"]}},
        {"text": "add two and two"},
    )
    rows = [
        row("say", LONG),
        row("Add two and two!", "4"),
        row("add two and three", "5"),
        row("Paris", "yes"),
    ]
    data = write(tmp_path / "a.jsonl", *rows)
    report = run(
        tmp_path, data, eval_ratio=0.1, seed=3, cleaning=Cleaning(benchmark_files=[str(benchmark)])
    )
    first = report["dropped"]["benchmark_overlap"]["first"]
    total = report["rows_dropped"] + report["evaluation"]["rows_read"]
    assert (
        all(f"{benchmark}:" in text for text in first) and 2 <= report["rows_dropped"] <= 3 <= total
    )
    write(benchmark, {"id": 7})
    with pytest.raises(ValueError, match="bench.jsonl: no text found to compare with"):
        run(tmp_path / "x", data, cleaning=Cleaning(benchmark_files=[str(benchmark)]))


def dropped(type: str, given: dict, **settings) -> str | None:
    try:
        check_row(read_row(type, given), Cleaning(**settings))
    except RowError as error:
        return error.reason
    return None


PAIR = {
    "context": [{"from": "human", "content": "Say hello"}],
    "chosen": [{"from": "assistant", "content": "Hello you"}],
    "rejected": [{"from": "assistant", "content": "no"}],
}
JUDGED = {
    "prompt": PAIR["context"],
    "completion": {"from": "assistant", "content": "Hello you"},
    "label": True,
}


@pytest.mark.parametrize(
    ("type", "given", "low", "high", "reason"),
    [
        ("sft", row("q", "abc", "q", "de"), 5, 5, None),  # the answers of a conversation together
        ("sft", row("q", "abc", "q", "de"), 6, 9, "answer_too_short"),
        ("sft", row("q", "abc", "q", "de"), 0, 4, "answer_too_long"),
        ("sft", {"source": "abc", "Target": "de"}, 7, None, "answer_too_short"),
        ("preference", PAIR, 2, 9, None),
        ("preference", PAIR, 3, 9, "answer_too_short"),  # either answer counts
        ("preference", PAIR, 2, 8, "answer_too_long"),
        ("kto", JUDGED, 9, 9, None),
        ("kto", JUDGED, 10, None, "answer_too_short"),
        ("prompt", row("a long question"), 10, 10, None),  # there is no answer
    ],
)
def test_length_bounds(type, given, low, high, reason):
    assert dropped(type, given, min_answer_chars=low, max_answer_chars=high) == reason


def with_answer(given: dict, key: str, text: str) -> dict:
    answer = {"from": "assistant", "content": text}
    return given | {key: answer if key == "completion" else [answer]}


@pytest.mark.parametrize(
    ("type", "given", "reason"),
    [
        ("sft", row("q", "a", "What?", " what?"), "answer_repeats_prompt"),
        ("sft", row("q", "a", "What?", "q"), None),  # an earlier question
        ("sft", row("q", "\u200b\u2060"), "blank_answer"),
        ("sft", row("q", "..."), None),
        ("sft", row("q", "🙂"), None),
        ("preference", with_answer(PAIR, "rejected", "say  HELLO"), "answer_repeats_prompt"),
        ("preference", with_answer(PAIR, "chosen", "\u200b"), "blank_answer"),
        ("preference", PAIR, None),
        ("kto", with_answer(JUDGED, "completion", "Say hello"), "answer_repeats_prompt"),
        ("kto", JUDGED, None),
        ("prompt", row("q"), None),
    ],
)
def test_trivial_answers(type, given, reason):
    assert dropped(type, given, drop_trivial_answers=True) == reason
    assert dropped(type, given) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"near_duplicates": 1.0}, "near_duplicates must lie between 0 and 1"),
        ({"overlap_words": 1}, "overlap_words must be at least 2"),
        ({"min_answer_chars": 5, "max_answer_chars": 4}, "no response fits between them"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Cleaning(**settings)


@pytest.mark.parametrize("type", ["preference", "kto", "prompt"])
def test_every_type_is_compared_as_a_whole(type, tmp_path):
    given = {"preference": PAIR, "kto": JUDGED, "prompt": row("q")}[type]
    other = {
        "preference": with_answer(PAIR, "rejected", "never"),
        "kto": JUDGED | {"label": False},
        "prompt": row("another q"),
    }[type]
    data = write(tmp_path / "a.jsonl", given, other, given, other)
    report = run(tmp_path, data, type=type, num_bins=1, cleaning=Cleaning(deduplicate=True))
    assert report["rows_kept"] == 2 and report["dropped"]["duplicate"]["rows"] == 2


def test_too_many_malformed_rows_end_the_job_with_the_most_frequent_reasons(tmp_path):
    bad = (
        ["{"] * 5
        + [{"x": 1}] * 4
        + [row("q", 7)] * 3
        + [row("q")] * 2
        + [{"messages": []}, row("q", " ")]
    )
    data = write(tmp_path / "a.jsonl", *[row("q", str(i)) for i in range(184)], *bad)
    with pytest.raises(ValueError) as error:
        run(tmp_path, data, max_bad_ratio=0.07)
    said = str(error.value)
    assert "16 of the first 200 rows are malformed; of all 200 rows at most a share of 0.07" in said
    order = [
        "5 x bad_json",
        "4 x wrong_keys",
        "3 x content_not_text",
        "2 x no_assistant_turn",
        "1 x ",
    ]
    places = [said.index(text) for text in order]
    assert places == sorted(places) and said.count(" x ") == 5 and said.count(f"{data}:") == 5
    assert f"{data}:185: " in said and not (tmp_path / "arrow").exists()
    assert run(tmp_path, data, max_bad_ratio=0.08)["rows_kept"] == 184
    with pytest.raises(ValueError, match="16 of the first 200 rows"):
        run(tmp_path, data)  # finished, but not good enough for the default
