"""What profile_step.py found, as text."""

from typing import Any

from benchmarks.machine_rates import bandwidth
from benchmarks.op_classes import OTHER, PARTS

MOST_SIZES = 8  # lines of the table of matrix products
NAMED = 3  # operators named for each part


def table(name: str, row: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """``row``: the figures of one case; ``before``: those of an earlier run, set beside them."""
    lines = [_title(name, row, before)]
    lines += [
        _part_line(part, seconds, row, before)
        for part, seconds in row["parts"].items()
        if part != "over"
    ]
    lines.append(f"  {'sum':18s}{_time(row['seconds']):>10s} {1:6.0%}")
    return "\n".join([*lines, *_certainty(row), *floor_lines(row, before), *product_lines(row)])


def _title(name: str, row: dict[str, Any], before: dict[str, Any] | None) -> str:
    whole = row["seconds"]
    low, high = row["quartiles"]
    article = "an" if row["unit"][0] in "aeiou" else "a"
    line = (
        f"{name}: {article} {row['unit']} takes {_time(whole)} (median of {row['steps']}; half of "
        f"them {_time(low)} to {_time(high)}), {row['tokens'] / whole:.0f} tokens/s"
    )
    if before:
        line += (
            f"; before {_time(before['seconds'])}, now {before['seconds'] / whole:.2f} x as fast"
        )
    return line


def _certainty(row: dict[str, Any]) -> list[str]:
    """How far the table can be trusted, and whether the processors were at work."""
    whole = row["seconds"]
    lines = []
    if over := row["parts"]["over"]:
        lines.append(
            f"    under the profiler the parts sum to {_time(-over)} more: it slows operators"
        )
    lines.append(
        f"    of no known part: {row['parts'][OTHER] / whole:.1%}; under the profiler it takes "
        f"{row['profiled_seconds'] / whole:.2f} times as long; {row['processor'] / whole:.2f} "
        f"cores are busy, the main thread is off them {1 - row['thread'] / whole:.0%} of the time"
    )
    return lines


def _part_line(part: str, seconds: float, row: dict, before: dict | None) -> str:
    line = f"  {part:18s}{_time(seconds):>10s} {seconds / row['seconds']:6.0%}"
    if before:
        line += f" (before{_time(before['parts'].get(part, 0.0)):>10s})"
    named = [
        f"{each['name'].removeprefix('aten::')} {_time(each['seconds'])}"
        for each in row["operators"]
        if each["part"] == part and each["seconds"] > 0.005 * row["seconds"]
    ]
    return f"{line}  {', '.join(named[:NAMED]) or PARTS[part]}"


def floor_lines(row: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """Every floor with the share of it that was reached, and the rates that it was computed by."""
    whole = row["seconds"]
    rates = row["rates"]
    titles = {
        "floors": "floor",
        "floors_prompts_once": "floor, the prompt of a pair once",
        "floors_onednn": "floor at the rate of oneDNN's product",
    }
    lines = []
    for key, title in titles.items():
        if floor := row.get(key):
            earlier = before and before.get(key)
            was = f" (before {earlier['seconds'] / before['seconds']:.0%})" if earlier else ""
            lines.append(
                f"  {title}: {_time(floor['seconds'])}, {floor['seconds'] / whole:.0%} of it{was}"
            )
    floor = row["floors"]
    lines.append(
        f"    arithmetic {_time(floor['arithmetic_seconds'])} ({floor['gflop']:.3g} Gflop at "
        f"{rates['matmul'] / 1e9:.0f} Gflop/s), memory {_time(floor['memory_seconds'])} "
        f"({floor['gbyte']:.3g} GB at {bandwidth(rates) / 1e9:.1f} GB/s)"
    )
    onednn = f", oneDNN's {rates['onednn'] / 1e9:.0f}" if "onednn" in rates else ""
    lines.append(
        f"    this machine: PyTorch's product {rates['matmul'] / 1e9:.0f} Gflop/s{onednn}; reads "
        f"{rates['read'] / 1e9:.1f} GB/s, copies {rates['copied'] / 1e9:.1f} GB/s"
    )
    pieces = floor["pieces"]
    for name, piece in pieces.items() if len(pieces) > 1 else ():
        lines.append(
            f"    {name:9s}{_time(row[name]):>10s}, floor {_time(piece['seconds'])}, "
            f"{piece['seconds'] / row[name]:.0%} of it"
        )
    return lines


def product_lines(row: dict[str, Any]) -> list[str]:
    """The sizes that took longest, and how fast each was."""
    rate = row["rates"]["matmul"] / 1e9
    lines = ["  matrix products (rows x inner x columns), the vocabulary's among them:"]
    shown = row["products"][:MOST_SIZES]
    lines += [
        f"    {each['size']:24s} {each['calls']:5.4g} times {_time(each['seconds']):>10s} "
        f"{each['gflops']:5.0f} Gflop/s, {each['gflops'] / rate:4.0%} of the machine's"
        for each in shown
    ]
    if rest := sum(each["seconds"] for each in row["products"][MOST_SIZES:]):
        lines.append(f"    {len(row['products']) - len(shown)} more sizes: {_time(rest)}")
    return lines


def _time(seconds: float) -> str:
    seconds = 0.0 if abs(seconds) < 5e-6 else seconds
    return f"{seconds:.3f} s" if abs(seconds) >= 1 else f"{1000 * seconds:.2f} ms"
