"""The report as one page that needs nothing beside it: no script, font, image or style of its own
elsewhere.

The page's text is report.html.jinja, in which everything is escaped unless it is a chart of
report_charts.py.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from coati.dataset.chat.masked_text import visible
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.report.charts import bar, length_chart, share_bar

LISTED = 100  # files named on the page
WHERE_USED = {
    "Latin": "English, French, German, Spanish, Turkish, ...",
    "Cyrillic": "Russian, Ukrainian, Bulgarian, ...",
    "Arabic": "Arabic, Persian, Urdu, ...",
    "Devanagari": "Hindi, Marathi, Nepali, ...",
    "Bengali": "Bengali, Assamese",
    "Han": "Chinese",
    "Kana": "Japanese",
    "Hangul": "Korean",
    "Gurmukhi": "Punjabi",
    "Ethiopic": "Amharic, Tigrinya",
    "none": "digits, signs or other letters only",
}
TRAITS = {
    "gt_answer": "prompts with a right answer (gt_answer)",
    "answer left out": "prompts whose last turn, the assistant's, was left out",
}
SETTINGS = {
    "tokenizer": "tokenizer",
    "cleaning": "cleaning",
    "seed": "seed",
    "rows_per_part": "rows drawn for each part",
    "end_of_assistant": "text that ends an answer",
    "stop_ids": "stop sequences, as token numbers",
    "stop_texts": "stop sequences, as text",
    "system_message": "system message",
    "chat_template": "chat template",
}


def page(report: dict[str, Any]) -> str:
    """The HTML of a report made by ``build_report``."""
    styles = {reason: _style(entry) for reason, entry in report["dropped"].items()}
    fate = _fate(report, styles)
    supervised = [
        ("learned", report["supervised_tokens"], "kept"),
        ("only read", report["tokens"] - report["supervised_tokens"], "ground"),
    ]
    charts = {
        "fate": share_bar(fate, "What became of the rows"),
        "lengths": length_chart(report["length_histogram"], report["max_length"]),
        "supervised": share_bar(supervised, "Share of the tokens that is learned"),
    }
    return _template().render(
        report=report,
        kind=DATA_TYPES[report["type"]].texts,
        evaluation=report.get("part") == "evaluation",
        tiles=_tiles(report),
        fate=fate,
        styles=styles,
        charts=charts,
        groups=_groups(report),
        settings=_settings(report),
        LISTED=LISTED,
    )


@lru_cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "percent": _percent, "visible": visible}
    return environment.from_string(
        (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    )


def _number(value: float) -> str:
    return f"{value:,}"


def _percent(share: float) -> str:
    """Shares that are nearly nothing or nearly all are not rounded to it."""
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    return f"{share:.1%}"


def _style(entry: dict[str, Any]) -> str:
    return {"malformed": "bad", "cleaned": "cleaned"}.get(entry["kind"], "unfit")


def _fate(report: dict[str, Any], styles: dict[str, str]) -> list[tuple[str, int, str]]:
    """Rows by what became of them: ``(name, rows, css class)``."""
    names = {
        "bad": "left out: the file is to be mended",
        "unfit": "left out: too long, or the template cannot write it",
        "cleaned": "left out by the cleaning that was asked for",
    }
    sums = dict.fromkeys(names, 0)
    for reason, entry in report["dropped"].items():
        sums[styles[reason]] += entry["rows"]
    return [
        ("used", report["rows_kept"], "kept"),
        *((names[style], rows, style) for style, rows in sums.items()),
    ]


def _tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        (_number(report["rows_read"]), "rows read"),
        (_number(report["rows_kept"]), "rows used"),
        (_number(report["rows_dropped"]), "rows left out"),
        (_number(report["rows_written"]), f"training rows in {len(report['shards'])} parts"),
        (_number(report["tokens"]), "tokens"),
    ]
    type = DATA_TYPES[report["type"]]
    if type.supervised:
        tiles.append((_percent(report["supervised_share"]), "of the tokens are learned"))
    if type.is_cut:
        tiles.append((_number(report["rows_truncated"]), "rows shortened to max_length"))
    return tiles


def _groups(report: dict[str, Any]) -> list[tuple[str, str, list]]:
    """``(title, remark, bars)`` of what was counted in the rows that are used."""
    scripts = {
        f"{name} ({WHERE_USED[name]})" if name in WHERE_USED else name: rows
        for name, rows in report["scripts"].items()
    }
    titles = TRAITS | DATA_TYPES[report["type"]].traits
    traits = {titles[name]: number for name, number in report["traits"].items()}
    return [
        ("Format", "In which of the known formats the rows were written.", _bars(report["shapes"])),
        ("Who speaks", "Messages by role.", _bars(report["roles"])),
        (
            "Who may not speak",
            "Rows left out for a turn of this role.",
            _bars(report["refused_roles"]),
        ),
        ("Writing system", "Rows by the script most of their letters belong to.", _bars(scripts)),
        ("Answers", "", _bars(traits)),
    ]


def _bars(counts: dict[str, int]) -> list[tuple[str, int, Any]]:
    most = max(counts.values(), default=0)
    return [(visible(name), number, bar(number, most)) for name, number in counts.items()]


def _settings(report: dict[str, Any]) -> list[tuple[str, str]]:
    known = {**report, **report.get("template", {})}
    drawn = report.get("num_samples_per_bin", -1)
    known["rows_per_part"] = drawn if drawn >= 0 else "all"
    known["cleaning"] = (
        ", ".join(f"{name} {value}" for name, value in report.get("cleaning", {}).items()) or "none"
    )
    if "tokenizer" in report:
        tokenizer = report["tokenizer"]
        known["tokenizer"] = f"{tokenizer['path']} ({tokenizer['vocab_size']:,} tokens)"
    return [
        (title, str(known[name]))
        for name, title in SETTINGS.items()
        if known.get(name) not in (None, "", [])
    ]
