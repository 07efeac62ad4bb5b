"""Plots of metrics by step, as a PNG.

``python examples/demo/curves.py METRICS NAME [NAME ...] --png FILE`` plots the named metrics of a
run's metrics.jsonl, each in a panel of its own.
"""

import argparse
import json
from pathlib import Path

Panel = tuple[list[list[float]], float]  # one curve per run, and the height of a dashed line


def draw(panels: dict[str, Panel], xlabel: str, path: Path) -> None:
    """Save one panel beside the other; ``panels``: title -> curves and a reference line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 4), layout="constrained")
    for axes, (title, (curves, mark)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve)
        axes.axhline(mark, color="gray", linestyle="--")
        axes.set(title=title, xlabel=xlabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--mark", type=float, default=0.0, help="height of a dashed line")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.metrics.read_text(encoding="utf-8").splitlines()]
    found = {name: [row[name] for row in rows if name in row] for name in args.names}
    draw({name: ([values], args.mark) for name, values in found.items()}, "report", args.png)
    print(f"the curves are in {args.png}")
