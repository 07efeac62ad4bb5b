"""The report of a preparation as JSON, as text for a terminal and as a page."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from coati.dataset.chat.masked_text import show_mask, visible
from coati.dataset.report.html import page
from coati.dataset.report.report_warnings import warnings_of
from coati.dataset.report.row_stats import RowStats
from coati.dataset.rows.row_errors import CLEANING_REASONS, MALFORMED, REASONS
from coati.utils.json_io import save_json, save_text

BARS = 40  # of the length histogram, at most
NICE = (1, 2, 5)
KINDS = dict.fromkeys(MALFORMED, "malformed") | dict.fromkeys(CLEANING_REASONS, "cleaned")
COUNTED = ("shapes", "roles", "refused_roles", "scripts", "traits")


def percentiles(lengths: Counter) -> dict[str, float]:
    """Nearest-rank percentiles, mean and extremes of row lengths in tokens; ``lengths`` counts rows
    by length."""
    total = lengths.total()
    if not total:
        return {}
    ordered = sorted(lengths)
    cumulative = list(accumulate(lengths[length] for length in ordered))
    ranks = {f"p{p}": max(1, -(-total * p // 100)) for p in (10, 50, 90, 99)}
    return {
        "min": ordered[0],
        "mean": round(sum(length * rows for length, rows in lengths.items()) / total, 1),
        **{name: ordered[bisect_left(cumulative, rank)] for name, rank in ranks.items()},
        "max": ordered[-1],
    }


def histogram(lengths: Counter) -> list[dict[str, int]]:
    """Rows by length in bars of equal, round width: ``{from, to, rows}``, both bounds included.

    A few rows far longer than the rest share one last, wider bar, so that they do not squeeze the
    others.
    """
    if not lengths:
        return []
    longest = max(lengths)
    usual = percentiles(lengths)["p99"]
    end = longest if longest <= 2 * usual else round(1.2 * usual)
    width = next(
        nice * 10**power for power in range(9) for nice in NICE if nice * 10**power * BARS >= end
    )
    bars = [
        {"from": start, "to": start + width - 1, "rows": 0} for start in range(1, end + 1, width)
    ]
    for length, rows in lengths.items():
        bars[min((length - 1) // width, len(bars) - 1)]["rows"] += rows
    bars[-1]["to"] = max(bars[-1]["to"], longest)
    return bars


def build_report(
    stats: RowStats, files: dict[int, str], shards: list[int], **settings: Any
) -> dict[str, Any]:
    """The JSON form of the report; ``settings`` (type, max_length, seed, ...) come first."""
    report = {
        **settings,
        "rows_read": stats.read.total(),
        "rows_kept": stats.kept.total(),
        "rows_dropped": stats.dropped.total(),
        "rows_malformed": stats.malformed(),
        "rows_written": stats.lengths.total(),
        "dropped": {
            reason: {
                "rows": stats.dropped[reason],
                "meaning": REASONS[reason],
                "kind": KINDS.get(reason, "unfit"),
                "first": stats.first[reason],
            }
            for reason in REASONS
            if stats.dropped[reason]
        },
        "rows_truncated": stats.truncated,
        "length": percentiles(stats.lengths),
        "length_histogram": histogram(stats.lengths),
        "tokens": stats.tokens,
        "supervised_tokens": stats.supervised,
        "supervised_share": round(stats.supervised / stats.tokens, 4) if stats.tokens else 0.0,
        "rows_ended": stats.ended,
        "answers_differ": len(stats.answers) > 1,
        **{name: dict(getattr(stats, name).most_common()) for name in COUNTED},
        "unused_columns": dict(stats.unused.most_common()),
        "unused_content": {
            name: {"rows": rows, "first": stats.first_missing[name]}
            for name, rows in stats.missing.most_common()
        },
        "files": [
            {"file": name, "rows_read": stats.read[index], "rows_kept": stats.kept[index]}
            for index, name in files.items()
        ],
        "shards": shards,
        "samples": [
            {
                "at": row.at,
                "notes": row.notes,
                "parts": [
                    {"name": name, "text": [list(run) for run in text]} for name, text in row.parts
                ],
            }
            for row in stats.shown
        ],
    }
    return report | {"warnings": warnings_of(report)}


def save_report(report: dict[str, Any], folders: Iterable[Path]) -> None:
    """Write ``report.json`` and ``report.html``, a self-contained page, into each of
    ``folders``."""
    html = page(report)
    for folder in folders:
        save_json(report, folder / "report.json")
        save_text(html, folder / "report.html")


def in_parts(shards: Sequence[Any]) -> str:
    """How many parts rows were written in."""
    return f"{len(shards)} part{'s' * (len(shards) != 1)}"


def format_report(report: dict[str, Any], color: bool) -> str:
    """The report for a terminal, with its first sample and that one's mask."""
    part = report.get("part", "training")
    lines = [
        f"rows read {report['rows_read']}, kept {report['rows_kept']}, dropped "
        f"{report['rows_dropped']}, truncated {report['rows_truncated']}; {part} rows written "
        f"{report['rows_written']} in {in_parts(report['shards'])}",
        *dropped_lines(report["dropped"]),
    ]
    if report["length"]:
        lines.append(
            "tokens per row: "
            + ", ".join(f"{name} {value}" for name, value in report["length"].items())
        )
    lines.append(
        f"tokens {report['tokens']}, supervised {report['supervised_tokens']} "
        f"({report['supervised_share']:.1%})"
    )
    if report["shapes"]:
        lines.append(
            "formats: " + ", ".join(f"{name} {rows}" for name, rows in report["shapes"].items())
        )
    if report["refused_roles"]:
        refused = ", ".join(
            f"{visible(role)} {rows}" for role, rows in report["refused_roles"].items()
        )
        lines.append(f"rows dropped for a turn of: {refused}")
    if report["unused_columns"]:
        unused = ", ".join(f"{visible(name)} {n}" for name, n in report["unused_columns"].items())
        lines.append(f"columns and fields that were not read, in rows: {unused}")
    for sample in report["samples"][:1]:
        marked = "green" if color else "in [[ ]]"
        lines.append(f"sample from {sample['at']} (supervised text {marked}):")
        for part in sample["parts"]:
            lines += [f"{part['name']}:"] if part["name"] else []
            lines.append(
                show_mask([(learned, visible(text)) for learned, text in part["text"]], color)
            )
    return "\n".join(lines)


def dropped_lines(dropped: dict[str, dict]) -> list[str]:
    lines = []
    for reason, entry in dropped.items():
        lines.append(f"  dropped {entry['rows']}: {reason} ({entry['meaning']})")
        lines += [f"    {visible(example)}" for example in entry["first"]]
        if entry["rows"] > len(entry["first"]):
            lines.append(f"    ... and {entry['rows'] - len(entry['first'])} more")
    return lines
