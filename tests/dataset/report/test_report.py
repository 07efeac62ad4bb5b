"""The report: counts by hand, the same however rows are cut into chunks, warnings, and a page that
runs nothing."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from coati.dataset import setup_conversation_template
from coati.dataset.chat.masked_text import segments, shorten, show_mask, visible
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.preparation import prepare_dataset
from coati.dataset.report.charts import length_charts
from coati.dataset.report.html import page
from coati.dataset.report.report import histogram, percentiles
from coati.dataset.report.report_warnings import warnings_of
from coati.dataset.report.row_stats import FIRST_FEW, Recorder, RowStats, SampledRow, draw_samples
from coati.dataset.report.writing_systems import main_scripts
from coati.dataset.rows.row_errors import RowError
from tests.dataset.makers import chatml_tokenizer

EVIL = "</div></body><script>alert('x')</script><img src=x onerror=\"alert(1)\"> &amp; {{ 7 * 7 }}"
ROWS = {
    "sft": lambda i: {"messages": [message("human", f"q{i}"), message("assistant", f"a{i}")]},
    "prompt": lambda i: {"messages": [message("human", f"q{i}")], "gt_answer": str(i)},
    "preference": lambda i: {
        "context": [message("human", f"q{i}")],
        "chosen": [message("assistant", f"a{i}")],
        "rejected": [message("assistant", f"b{i}")],
    },
    "kto": lambda i: {
        "prompt": [message("human", f"q{i}")],
        "completion": message("assistant", f"a{i}"),
        "label": i % 2 == 0,
    },
}


def message(role: str, content: str) -> dict[str, str]:
    return {"from": role, "content": content}


def prepared(folder: Path, rows: list, type: str = "sft", **settings) -> dict:
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows)
    )
    tokenizer = chatml_tokenizer()
    return prepare_dataset(
        type=type,
        inputs=[data],
        tokenizer=tokenizer,
        tokenizer_name="tiny",
        template=setup_conversation_template(tokenizer, {}),
        arrow_dir=folder / "arrow",
        jsonl_dir=folder / "jsonl",
        cache_dir=folder / "cache",
        **{"num_proc": 1, "num_bins": 1, "show": None, **settings},
    )


class Tags(HTMLParser):
    """What a browser would see in a page: elements with their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


# The same lengths as a list, and as the report has them.
@pytest.mark.parametrize("lengths", [list(range(1, 11)), [5], [1] * 99 + [1000], [3, 3, 3, 9]])
def test_percentiles_are_nearest_ranks(lengths):
    found = percentiles(Counter(lengths))
    for p in (10, 50, 90, 99):
        at_least = min(
            n for n in lengths if 100 * sum(other <= n for other in lengths) >= p * len(lengths)
        )
        assert found[f"p{p}"] == at_least
    assert (found["min"], found["max"]) == (min(lengths), max(lengths))
    assert found["mean"] == round(sum(lengths) / len(lengths), 1)


def test_percentiles_of_nothing():
    assert percentiles(Counter()) == {} and histogram(Counter()) == []


@pytest.mark.parametrize(
    "lengths", [[1], [7, 7, 30], list(range(1, 400)), [1] * 900 + [4096], [2, 100_000]]
)
def test_every_row_is_in_one_bar_of_the_histogram(lengths):
    bars = histogram(Counter(lengths))
    assert len(bars) <= 41 and sum(bar["rows"] for bar in bars) == len(lengths)
    assert bars[0]["from"] == 1 and bars[-1]["to"] >= max(lengths)
    for bar, following in zip(bars, bars[1:], strict=False):
        assert following["from"] == bar["to"] + 1
    for bar in bars:
        assert bar["rows"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)


def test_one_long_row_does_not_press_the_others_together():
    bars = histogram(Counter(list(range(1, 101)) * 5 + [5000]))
    assert len(bars) > 20 and bars[-1]["to"] == 5000 and sum(bar["rows"] > 0 for bar in bars) > 20


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, 12 worlds", "Latin"),
        ("Grüße aus Đà Nẵng", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("誰是蜘蛛人", "Han"),
        ("コンピュータは計算機です", "Kana"),
        ("計算機科学", "Han"),
        ("안녕하세요", "Hangul"),
        ("مرحبا", "Arabic"),
        ("שלום", "Hebrew"),
        ("Γειά σου", "Greek"),
        ("मैं अच्छा हूँ", "Devanagari"),
        ("আমি ভালো", "Bengali"),
        ("สวัสดี", "Thai"),
        ("வணக்கம்", "Tamil"),
        ("𠀀𠀁", "Han"),
        ("12 + 30 = 😀", "none"),
        ("", "none"),
        ("\U0010fffd", "none"),
    ],
)
def test_scripts(text, script):
    assert main_scripts([text]) == [script]
    assert main_scripts(["x", text, "да", text]) == ["Latin", script, "Cyrillic", script]
    assert main_scripts([]) == []


def test_runs_of_a_mask():
    parts = segments(
        [1, 2, 3, 4, 5], [False, True, True, False, True], lambda ids: "".join(map(str, ids))
    )
    assert parts == [(False, "1"), (True, "23"), (False, "4"), (True, "5")]
    assert show_mask(parts, color=False) == "1[[23]]4[[5]]"
    assert show_mask([(False, "q"), (True, "a")], color=True) == "q\033[32ma\033[0m"


def test_long_texts_lose_their_middle():
    parts = [(False, "a" * 50), (True, "b" * 50)]
    assert shorten(parts, 100) == parts
    assert shorten(parts, 60) == [
        (False, "a" * 40),
        (None, " … 40 characters left out … "),
        (True, "b" * 20),
    ]
    assert shorten([(True, "abcdef")], 3) == [
        (True, "ab"),
        (None, " … 3 characters left out … "),
        (True, "f"),
    ]


def test_control_characters_become_signs():
    assert visible("a\x00\x1b[31m\n\tb\x7f\ud83d") == "a␀␛[31m\n\tb\ufffd\ufffd"


def recorded(lines, conversation, chunk: int) -> RowStats:
    """The stats of source rows, recorded ``chunk`` rows at a time."""
    from coati.dataset.rows.formats import read_row

    whole = RowStats()
    for start in range(0, len(lines), chunk):
        recorder = Recorder(DATA_TYPES["sft"], conversation)
        for line, row in enumerate(lines[start : start + chunk], start + 1):
            recorder.stats.read[0] += 1
            if row is None:
                recorder.stats.drop(RowError("bad_json", "x"), f"f:{line}")
                continue
            source = read_row("sft", row)
            recorder.keep(
                0, line, f"f:{line}", source, DATA_TYPES["sft"].tokenize(source, conversation, 100)
            )
        whole.merge(recorder.close())
    return whole


def test_a_stats_is_the_same_however_the_rows_were_cut():
    conversation = setup_conversation_template(chatml_tokenizer(), {})
    lines = [None if i % 7 == 3 else ROWS["sft"](i) for i in range(60)]
    one, many = recorded(lines, conversation, 60), recorded(lines, conversation, 4)
    assert one == many
    assert [row.at for row in one.shown] == [row.at for row in many.shown] and one.shown[
        0
    ].at == "f:1"
    assert len(one.shown) == 3 and len({row.at for row in one.shown}) == 3
    assert (
        one.first == {"bad_json": ["f:4: x", "f:11: x", "f:18: x"]} and one.dropped["bad_json"] == 9
    )
    assert len(one.first["bad_json"]) == FIRST_FEW


def test_a_stats_does_not_grow_with_the_rows():
    """A million rows more change numbers, not their number."""
    stats = RowStats(lengths=Counter({n: 1 for n in range(1, 101)}), answers=[1, 2])
    stats.shown = [SampledRow((n, n), f"f:{n}", [], {}) for n in range(3)]
    before = (len(stats.lengths), len(stats.shown), len(stats.answers))
    for n in range(1000):
        later = RowStats(
            lengths=Counter({n % 100 + 1: 1000}),
            answers=[n, n + 1],
            shown=[SampledRow((n, n), f"f:{n}", [], {})],
        )
        stats.merge(later)
    assert (len(stats.lengths), len(stats.shown), len(stats.answers)) == before
    assert stats.lengths.total() == 1_000_100
    assert draw_samples([]) == []


@pytest.mark.parametrize("type", ROWS)
def test_the_page_of_every_type(type, tmp_path):
    rows = [ROWS[type](i) for i in range(250)] + ["{", json.dumps({"text": EVIL, "x": 1})]
    report = prepared(tmp_path, rows, type, max_length=64)
    html = (tmp_path / "jsonl" / "report.html").read_text(encoding="utf-8")
    assert html == (tmp_path / "arrow" / "report.html").read_text(encoding="utf-8") == page(report)
    stored = (tmp_path / "jsonl" / "report.json").read_text()
    assert (
        json.loads(stored) == report and stored == (tmp_path / "arrow" / "report.json").read_text()
    )
    seen = Tags(html)
    text = " ".join("".join(seen.text).split())
    assert f"Of 252 rows read, {report['rows_kept']} " in text
    assert f"{tmp_path}/rows.jsonl:251: " in text and "<|im_end|>" in text and "max_length" in text
    marks = sum(tag == "mark" for tag, _ in seen.tags)
    assert marks == {"sft": 3, "prompt": 0, "preference": 6, "kto": 3}[type]
    assert (
        sum(attributes.get("role") == "img" for _, attributes in seen.tags) >= 4
        and len(report["samples"]) == 3
    )


def test_numbers_of_pairs_and_labels(tmp_path):
    conversation = setup_conversation_template(chatml_tokenizer(), {})
    pairs = prepared(tmp_path / "pairs", [ROWS["preference"](i) for i in range(60)], "preference")
    answer = len(conversation.tokenizer.encode("a0", add_special_tokens=False)) + 1
    short = sum(len(str(i)) for i in range(60)) + 2 * 60  # "a", digits, end marker
    assert pairs["traits"] == {"chosen tokens": short, "rejected tokens": short} and answer == 3
    assert (
        pairs["supervised_tokens"] == 2 * short
        and pairs["rows_ended"] == 60
        and pairs["shapes"] == {"preference": 60}
    )
    assert pairs["roles"] == {"assistant": 120, "user": 60}
    judged = prepared(tmp_path / "judged", [ROWS["kto"](i) for i in range(61)], "kto")
    assert (
        judged["traits"] == {"label true": 31, "label false": 30}
        and judged["supervised_tokens"] == short + 4
    )
    asked = prepared(tmp_path / "asked", [ROWS["prompt"](i) for i in range(60)], "prompt")
    assert (
        asked["traits"] == {"gt_answer": 60}
        and asked["supervised_tokens"] == 0
        and asked["roles"] == {"user": 60}
    )
    assert asked["samples"][0]["notes"]["right answer (gt_answer)"] == "0"
    assert pairs["warnings"] == judged["warnings"] == asked["warnings"] == []


@pytest.mark.parametrize("type", ROWS)
def test_markup_in_rows_stays_text(type, tmp_path):
    """Whatever a row, a file name or a flag holds is shown as it stands there, and nothing of it
    runs."""
    rows = json.loads(json.dumps([ROWS[type](0)] * 250).replace("q0", EVIL.replace('"', '\\"')))
    rows += [
        {"messages": [message(EVIL, "x")]},
        {"prompt": [message(EVIL, "x")], "completion": EVIL, "label": EVIL},
    ]
    report = prepared(tmp_path / "<script>&", rows, type)
    report["command"] = report["files"][0]["file"] = report["template"]["chat_template"] = EVIL
    seen = Tags(page(report))
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in seen.tags}
    for tag, attributes in seen.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes), (
            tag,
            attributes,
        )
    assert EVIL in "".join(seen.text) and "<script>&" in "".join(seen.text)


def test_the_page_needs_nothing_beside_it(tmp_path):
    report = prepared(tmp_path, [ROWS["sft"](i) for i in range(60)])
    html = page(report)
    assert (
        "http:" not in html
        and "https:" not in html
        and "url(" not in html
        and "@import" not in html
    )
    assert "default-src 'none'" in html and len(html) < 60_000


def test_a_row_of_control_characters_is_printed_harmlessly(tmp_path, capsys):
    row = {"messages": [message("human", "\x1b[2J\x00 hi"), message("assistant", "a")]}
    prepared(tmp_path, [row] * 150 + ['{"messages": "\x1b[2J'], show=print)
    assert "\x1b" not in capsys.readouterr().out
    html = (tmp_path / "jsonl" / "report.html").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f]", html) and "␛[2J␀ hi" in html


def test_command_tokenizer_and_template_are_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare_dataset.py", "--data_input_dirs", "my data.jsonl"])
    report = prepared(tmp_path, [ROWS["sft"](i) for i in range(60)])
    assert report["command"] == "python prepare_dataset.py --data_input_dirs 'my data.jsonl'"
    assert report["tokenizer"]["path"] == "tiny" and report["template"]["stop_texts"] == [
        "<|im_end|>"
    ]
    text = "".join(Tags(page(report)).text)
    assert "'my data.jsonl'" in text and "add_generation_prompt" in text and "tiny (" in text


def test_evaluation_rows_have_a_page_of_their_own(tmp_path):
    report = prepared(tmp_path, [ROWS["sft"](i) for i in range(100)], eval_ratio=0.2)
    below = json.loads((tmp_path / "jsonl" / "eval" / "report.json").read_text())
    assert below["rows_kept"] == report["evaluation"]["rows_kept"] > 0 and "evaluation" not in below
    assert "(sft), kept for evaluation</h1>" in page(below) and "(sft)</h1>" in page(report)
    assert f"of {below['rows_read']} rows read" in " ".join(
        "".join(Tags(page(report)).text).split()
    )
    assert (tmp_path / "arrow" / "eval" / "report.html").read_text() == page(below)


def test_cleaned_rows_are_not_called_broken(tmp_path):
    from coati.dataset.clean.cleaning import Cleaning

    rows = [ROWS["sft"](i % 90) for i in range(100)]
    report = prepared(tmp_path, rows, cleaning=Cleaning(deduplicate=True))
    assert report["dropped"]["duplicate"]["kind"] == "cleaned" and report["warnings"] == []
    text = " ".join("".join(Tags(page(report)).text).split())
    assert "dropped by the cleaning that was asked for: 10" in text and "deduplicate True" in text
    assert "needs fixing" not in text


# --- warnings ---


def said(report: dict, fragment: str) -> bool:
    return any(fragment in warning for warning in report["warnings"])


def test_good_rows_get_no_warning(tmp_path):
    report = prepared(tmp_path, [ROWS["sft"](i) for i in range(60)])
    assert report["warnings"] == [] and "Nothing in these rows looks odd" in page(report)


def test_identical_answers(tmp_path):
    rows = [
        {"messages": [message("human", f"q{i}"), message("assistant", "same")]} for i in range(60)
    ]
    assert said(prepared(tmp_path, rows), "all responses are identical")


def test_much_truncation_and_few_rows(tmp_path):
    long = {"messages": [message("human", "q"), message("assistant", "a")] * 9}
    rows = [ROWS["sft"](i) for i in range(8)]
    report = prepared(tmp_path / "a", [*rows, long], max_length=64)
    assert report["rows_truncated"] == 1 and said(report, "only 9 training rows")
    assert said(
        report, "1 of 9 rows lost their last rounds because they are longer than max_length 64"
    )
    report = prepared(tmp_path / "b", [*rows, rows[0], long], max_length=64)
    assert not said(report, "lost their last rounds")  # 1 of 10 is not over 10%


def test_tiny_answers(tmp_path):
    rows = [
        {"messages": [message("human", "word " * 400), message("assistant", str(i))]}
        for i in range(60)
    ]
    assert said(prepared(tmp_path, rows), "of the tokens are trained on")


def test_many_too_long(tmp_path):
    rows = [ROWS["sft"](i) for i in range(50)] + [
        {"messages": [message("human", "x" * 99), message("assistant", "a")]}
    ] * 9
    assert said(prepared(tmp_path, rows, max_length=64), "9 of 59 rows were dropped")


def test_answers_without_an_end():
    """Rows of a template whose end marker stays outside the mask; such a template is refused, so
    this is by hand."""
    conversation = setup_conversation_template(chatml_tokenizer(), {})
    recorder = Recorder(DATA_TYPES["sft"], conversation)
    assert conversation.stop_ids == [[2]]
    for ids, labels in (
        ([1, 9, 2], [-100, 9, -100]),
        ([1, 9, 2], [-100, 9, 2]),
        ([1, 9], [-100, -100]),
    ):
        recorder._count({"input_ids": ids, "labels": labels, "seq_length": len(ids)})
    assert recorder.stats.ended == 1
    report = {"type": "sft", "rows_written": 3, "rows_ended": 1}
    from coati.dataset.report.report_warnings import _never_ends

    assert list(_never_ends(report))[0].startswith(
        "the end of a response is learned in only 1 of 3 training rows"
    )
    assert "in none of the 3" in list(_never_ends(report | {"rows_ended": 0}))[0]
    assert not list(_never_ends(report | {"rows_ended": 3})) and not list(
        _never_ends(report | {"type": "prompt"})
    )


def test_roles_that_left_rows_out_are_counted(tmp_path, capsys):
    rows = [ROWS["sft"](i) for i in range(20)]
    for place, role in enumerate(["tool", "bing", "Tool", "narrator\x1b", "tool"]):
        rows[place]["messages"].insert(1, message(role, "x"))
    report = prepared(tmp_path, rows, max_bad_ratio=1, show=print)
    assert report["refused_roles"] == {"tool": 3, "bing": 1, "narrator\x1b": 1}
    assert "rows dropped for a turn of: tool 3, bing 1, narrator␛ 1" in capsys.readouterr().out
    assert {"tool", "bing", "narrator␛"} <= set(Tags(page(report)).text)


def test_endless_roles_do_not_fill_the_memory():
    stats = RowStats()
    for n in range(1000):
        stats.drop(RowError("unknown_role", "x", f"{n}" * 1000), "f:1")
    other = RowStats()
    other.merge(stats)
    assert (
        len(stats.refused_roles) < 30
        and stats.refused_roles.total() == other.refused_roles.total() == 1000
    )
    assert max(map(len, stats.refused_roles)) <= 40 and other.refused_roles["others"] > 900


def test_one_label_only_and_missing_ground_truths(tmp_path):
    report = prepared(tmp_path / "kto", [ROWS["kto"](2 * i) for i in range(60)], "kto")
    assert said(report, "no row has label false")
    rows = [ROWS["prompt"](i) for i in range(60)]
    del rows[0]["gt_answer"]
    assert said(
        prepared(tmp_path / "prompt", rows, "prompt"), "only 59 of 60 prompts have a gt_answer"
    )


def test_longer_chosen_answers(tmp_path):
    rows = [ROWS["preference"](i) for i in range(60)]
    for row in rows:
        row["chosen"][0]["content"] += " and more words than the other one has"
    assert said(prepared(tmp_path, rows, "preference"), "chosen responses are on average")


def test_every_warning_is_a_sentence_about_the_report(tmp_path):
    report = prepared(tmp_path, [ROWS["sft"](i) for i in range(3)], num_bins=5)
    assert warnings_of(report) == report["warnings"] and said(report, "2 of 5 parts hold no row")


# --- the length histogram ---


def bars(*rows: int, width: int = 10) -> list[dict[str, int]]:
    edges = range(1, len(rows) * width, width)
    return [
        {"from": at, "to": at + width - 1, "rows": n} for at, n in zip(edges, rows, strict=True)
    ]


def test_charts_are_the_same_every_time_and_take_their_colors_from_the_page():
    once, again = (length_charts(bars(3, 0, 5), 32) for _ in range(2))
    assert once == again and [name for name, _ in once] == ["wide", "narrow"]
    for _, chart in once:
        assert not re.search("#[0-9a-f]{6}| id=|font|href|http", chart)
        assert "var(--kept)" in chart and "max_length 32<" in chart and "tokens per row<" in chart
    assert length_charts([], 32) == []


def test_a_limit_far_beyond_the_rows_is_an_arrow():
    _, chart = length_charts(bars(3, 0, 5), 4096)[0]
    assert "max_length 4,096 is far to the right →" in chart and ">4,000<" not in chart
    wide_last = bars(3, 0, 5)
    wide_last[-1]["to"] = 90
    assert "the last bar: 21 to 90" in length_charts(wide_last, 90)[0][1]
