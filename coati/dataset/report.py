"""What a preparation did with its rows: counted in the workers, merged in order, printed and stored."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from coati.dataset.reasons import MALFORMED, REASONS, RowError

FIRST_FEW = 3
GREEN, RESET = "\033[32m", "\033[0m"
Segments = list[tuple[bool, str]]


@dataclass
class Tally:
    """Counts over some source rows. ``kept`` counts source rows, ``lengths`` has one entry per training row."""

    read: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    lengths: array = field(default_factory=lambda: array("l"))
    supervised: int = 0
    truncated: int = 0
    sample: tuple[str, Segments] | None = None

    def drop(self, error: RowError, where: str) -> None:
        self.dropped[error.reason] += 1
        examples = self.first.setdefault(error.reason, [])
        if len(examples) < FIRST_FEW:
            examples.append(f"{where}: {error.detail}")

    def malformed(self) -> int:
        return sum(count for reason, count in self.dropped.items() if reason in MALFORMED)

    def merge(self, later: "Tally") -> None:
        for name in ("read", "kept", "dropped"):
            getattr(self, name).update(getattr(later, name))
        for reason, examples in later.first.items():
            mine = self.first.setdefault(reason, [])
            mine.extend(examples[: FIRST_FEW - len(mine)])
        self.lengths.extend(later.lengths)
        self.supervised += later.supervised
        self.truncated += later.truncated
        self.sample = self.sample or later.sample


def segments(input_ids: list[int], labels: list[int], decode) -> Segments:
    """The row as runs of ``(supervised, text)``."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(input_ids, labels, strict=True):
        supervised = label == token
        if not runs or runs[-1][0] != supervised:
            runs.append((supervised, []))
        runs[-1][1].append(token)
    return [(supervised, decode(ids)) for supervised, ids in runs]


def show_mask(parts: Segments, colour: bool) -> str:
    """Supervised text in green, or in [[double brackets]]."""
    before, after = (GREEN, RESET) if colour else ("[[", "]]")
    return "".join(before + text + after if supervised else text for supervised, text in parts)


def percentiles(lengths: array) -> dict[str, float]:
    """Nearest-rank percentiles, mean and extremes of the row lengths in tokens."""
    ordered = sorted(lengths)
    if not ordered:
        return {}
    ranks = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in (10, 50, 90, 99)}
    return {"min": ordered[0], "mean": round(sum(ordered) / len(ordered), 1), **ranks, "max": ordered[-1]}


def build_report(tally: Tally, files: list[str], shards: list[int], **settings: Any) -> dict[str, Any]:
    """The JSON form of the report; ``settings`` (type, max_length, seed, ...) come first."""
    tokens = sum(tally.lengths)
    return {
        **settings,
        "rows_read": tally.read.total(),
        "rows_kept": tally.kept.total(),
        "rows_dropped": tally.dropped.total(),
        "rows_written": len(tally.lengths),
        "dropped": {
            reason: {"rows": tally.dropped[reason], "meaning": REASONS[reason], "first": tally.first[reason]}
            for reason in REASONS
            if tally.dropped[reason]
        },
        "rows_truncated": tally.truncated,
        "length": percentiles(tally.lengths),
        "tokens": tokens,
        "supervised_tokens": tally.supervised,
        "supervised_share": round(tally.supervised / tokens, 4) if tokens else 0.0,
        "files": [
            {"file": name, "rows_read": tally.read[index], "rows_kept": tally.kept[index]}
            for index, name in enumerate(files)
        ],
        "shards": shards,
        "sample": {"at": tally.sample[0], "text": show_mask(tally.sample[1], colour=False)} if tally.sample else None,
    }


def format_report(report: dict[str, Any], sample: Segments | None, colour: bool) -> str:
    """The report for a terminal; ``sample`` is shown with its mask."""
    lines = [
        f"rows read {report['rows_read']}, kept {report['rows_kept']}, dropped {report['rows_dropped']}, "
        f"truncated {report['rows_truncated']}; training rows written {report['rows_written']} "
        f"in {len(report['shards'])} parts",
        *dropped_lines(report["dropped"]),
    ]
    if report["length"]:
        lines.append("tokens per row: " + ", ".join(f"{name} {value}" for name, value in report["length"].items()))
    lines.append(
        f"tokens {report['tokens']}, supervised {report['supervised_tokens']} ({report['supervised_share']:.1%})"
    )
    if sample:
        marked = "green" if colour else "in [[ ]]"
        lines.append(f"sample from {report['sample']['at']} (supervised text {marked}):\n{show_mask(sample, colour)}")
    return "\n".join(lines)


def dropped_lines(dropped: dict[str, dict]) -> list[str]:
    lines = []
    for reason, entry in dropped.items():
        lines.append(f"  dropped {entry['rows']}: {reason} ({entry['meaning']})")
        lines += [f"    {example}" for example in entry["first"]]
        if entry["rows"] > len(entry["first"]):
            lines.append(f"    ... and {entry['rows'] - len(entry['first'])} more")
    return lines
