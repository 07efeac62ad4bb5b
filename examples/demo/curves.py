"""Curves of several runs side by side as a picture, drawn with Pillow alone.

``python examples/demo/curves.py METRICS NAME [NAME ...] --png FILE`` draws metrics of a run's
metrics.jsonl.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 400, 64, 24, 48, 56
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
)  # Okabe and Ito
Panel = tuple[list[list[float]], float]  # a curve for each run, and the height of a dashed line


def draw(panels: dict[str, Panel], below: str) -> Image.Image:
    """One panel beside the other; ``panels``: title -> curves and a mark; ``below``: what runs
    along the x axis."""
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    for number, (title, (curves, mark)) in enumerate(panels.items()):
        _panel(pen, number * WIDTH, title, curves, mark, below)
    return image


def _panel(
    pen: ImageDraw.ImageDraw,
    left: int,
    title: str,
    curves: list[list[float]],
    mark: float,
    below: str,
) -> None:
    font, values = ImageFont.load_default(15), [value for curve in curves for value in curve]
    low, high = min(0.0, *values), max(mark, *values) * 1.05
    longest = max(map(len, curves))

    def at(episode: float, value: float) -> tuple[float, float]:
        x = left + LEFT + (WIDTH - LEFT - RIGHT) * episode / max(longest - 1, 1)
        return x, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    pen.text((left + LEFT, 14), title, fill="black", font=font)
    pen.line([at(0, high), at(0, low), at(longest - 1, low)], fill="black", width=2)
    for part in range(5):
        value = low + (high - low) * part / 4
        pen.text(
            (at(0, value)[0] - 8, at(0, value)[1]),
            f"{value:.2g}",
            fill="black",
            font=font,
            anchor="rm",
        )
        episode = (longest - 1) * part / 4
        pen.text(
            (at(episode, low)[0], HEIGHT - BOTTOM + 8),
            f"{episode + 1:.0f}",
            fill="black",
            font=font,
            anchor="ma",
        )
    pen.text((left + WIDTH // 2, HEIGHT - 6), below, fill="black", font=font, anchor="ms")
    for dash in range(0, 100, 4):
        ends = [at((longest - 1) * share / 100, mark) for share in (dash, dash + 2)]
        pen.line(ends, fill="#555555", width=2)
    for number, curve in enumerate(curves):
        points = [at(episode, value) for episode, value in enumerate(curve)]
        pen.line(points, fill=COLORS[number % len(COLORS)], width=2)


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
    draw({name: ([values], args.mark) for name, values in found.items()}, "report").save(args.png)
    print(f"the curve is in {args.png}")
