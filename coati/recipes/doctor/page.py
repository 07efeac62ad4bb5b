"""A diagnosis for people, and for programs."""

from dataclasses import asdict
from typing import Any

from coati.recipes.doctor.diagnosis import Diagnosis
from coati.utils.text_table import table, terminal_width

SUBJECT = 14


def as_json(found: Diagnosis) -> dict[str, Any]:
    """``findings`` have ``level`` ("mend" or "note"), ``host``, ``found`` and ``remedy``."""
    return {"ok": not found.to_mend, **asdict(found)}


def as_text(found: Diagnosis) -> str:
    """A column for each host, then what to mend and to note."""
    lines = []
    if found.reports:
        hosts = list(found.reports)
        width = max(20, (terminal_width() - SUBJECT - 3 * len(hosts)) // len(hosts))
        rows = [[name, *cells] for name, cells in _rows(found).items()]
        widths = [SUBJECT, *[width] * len(hosts)]
        lines.append(table(["", *hosts], rows, widths, [False] * len(widths)))
    for pair, speed in found.pairs.items():
        lines.append(
            f"{pair}: {speed['latency_ms']:.2f} ms, {speed['mib_per_s']:.0f} MiB/s (all-reduce)"
        )
    if found.shared:
        lines.append("--save_dir is the same directory on all hosts")
    lines.append("")
    lines += [f"{one.level}: {one.text}" for one in (*found.to_mend, *found.to_note)]
    lines.append(_summary(found))
    return "\n".join(lines)


def _rows(found: Diagnosis) -> dict[str, list[str]]:
    """Subject -> a text for each host."""
    rows: dict[str, list[str]] = {}
    for host, report in found.reports.items():
        for name, value in _flat(report, found.clocks.get(host)).items():
            rows.setdefault(name, ["" for _ in found.reports])[list(found.reports).index(host)] = (
                value
            )
    return rows


def _flat(report: dict[str, Any], clock: float | None) -> dict[str, str]:
    shown = {name: report["packages"].get(name, "missing") for name in ("torch", "transformers")}
    rest = [f"{n} {v}" for n, v in report["packages"].items() if n not in shown]
    flat = {"coati": report["coati"], "Python": report["Python"], **shown}
    flat |= {"packages": ", ".join(rest), "system": f"{report['system']}, {report['cpus']} cores"}
    names = ("devices", "free memory", "shared memory", "open files", "address", "port", "sandbox")
    flat |= {name: report[name] for name in names if name in report}
    flat |= {f"disk: {name}": value for name, value in report["free disk"].items()}
    if clock is not None:
        flat["clock"] = f"{clock * 1e3:+.0f} ms"
    return flat


def _summary(found: Diagnosis) -> str:
    mend = len(found.to_mend)
    note = len(found.to_note)
    if not mend:
        return f"nothing to mend{f', {note} to know' if note else ''}"
    return f"{mend} to mend{f', {note} to know' if note else ''}"
