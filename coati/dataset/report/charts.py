"""The charts of the report page as inline SVG.

Widths are percentages and there is no viewBox, so that a chart fills its column while its letters
keep their size.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

HEIGHT, TOP, BOTTOM = 240, 24, 40  # of the histogram, in px
BAR = 18  # height of a horizontal bar, in px


def share_bar(parts: Sequence[tuple[str, int, str]], what: str) -> Markup:
    """One bar over the whole width, cut into ``(name, number, css class)``; ``what`` says what it
    shows."""
    total = sum(number for _, number, _ in parts) or 1
    drawn, start = [], 0.0
    for name, number, style in parts:
        width = 100 * number / total
        if number:
            title = escape(f"{name}: {number:,} ({number / total:.1%})")
            place = f'x="{start:.3f}%" width="{width:.3f}%" height="{BAR}"'
            drawn.append(f'<rect class="{style}" {place}><title>{title}</title></rect>')
        start += width
    return _svg(BAR, what, drawn)


def bar(number: int, most: int, style: str = "kept") -> Markup:
    """One horizontal bar, ``most`` being the full width."""
    width = 100 * number / max(most, 1)
    return _svg(
        BAR,
        f"{number:,}",
        [
            f'<rect class="ground" width="100%" height="{BAR}"/>',
            f'<rect class="{style}" width="{width:.3f}%" height="{BAR}"/>',
        ],
    )


def length_chart(bars: Sequence[dict[str, int]], max_length: int) -> Markup:
    """Rows by length in tokens, with a line at ``max_length``.

    A limit far behind the longest row would press the bars together; then an arrow points at it.
    """
    if not bars:
        return Markup("")
    width = bars[0]["to"] - bars[0]["from"] + 1
    near = max_length <= 1.5 * bars[-1]["from"] + width
    end = max(len(bars) * width, max_length if near else 0)
    most = max(one["rows"] for one in bars)
    ground = HEIGHT - BOTTOM
    lines, labels = zip(*(_grid_line(most, share, ground) for share in (0.5, 1.0)), strict=True)
    columns = [_column(one, width, end, most, ground) for one in bars if one["rows"]]
    drawn = [*lines, *columns, *labels]
    drawn.append(f'<line class="axis" x1="0" x2="100%" y1="{ground}" y2="{ground}"/>')
    drawn += _ticks(bars, width, end, ground)
    drawn += _limit_line(max_length, end, ground) if near else _limit_arrow(max_length, ground)
    return _svg(HEIGHT, f"Rows by length in tokens; max_length is {max_length}", drawn)


def _column(one: dict[str, int], width: int, end: int, most: int, ground: int) -> str:
    height = max(1.0, (ground - TOP) * one["rows"] / most)
    x, wide = 100 * (one["from"] - 1) / end, 100 * width / end
    title = escape(f"{one['from']:,} to {one['to']:,} tokens: {one['rows']:,} rows")
    return (
        f'<rect class="kept" x="{x:.3f}%" width="{0.9 * wide:.3f}%" y="{ground - height:.1f}" height="{height:.1f}">'
        f"<title>{title}</title></rect>"
    )


def _grid_line(most: int, share: float, ground: int) -> tuple[str, str]:
    """The line and its label, which is drawn above the columns."""
    y = ground - (ground - TOP) * share
    label = (
        f'<text class="small" x="0" y="{y - 4:.1f}">{most * share:,.0f} rows</text>'
        if most * share >= 1
        else ""
    )
    return f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>', label


def _ticks(bars: Sequence[dict[str, int]], width: int, end: int, ground: int) -> list[str]:
    """At most five numbers below the axis, at the left edges of bars; the last says so when it
    stands for more."""
    step = width * max(1, -(-end // width // 4))
    drawn = []
    for value in range(0, end + 1, step):
        share = 100 * value / end
        anchor = "start" if share < 4 else "end" if share > 96 else "middle"
        drawn.append(
            f'<text class="small" x="{share:.3f}%" y="{ground + 16}" text-anchor="{anchor}">{value:,}</text>'
        )
    text = "tokens in a row"
    if bars[-1]["to"] - bars[-1]["from"] + 1 > width:
        text += f"; the last bar is {bars[-1]['from']:,} to {bars[-1]['to']:,}"
    return [
        *drawn,
        f'<text class="small" x="50%" y="{ground + 34}" text-anchor="middle">{text}</text>',
    ]


def _limit_line(max_length: int, end: int, ground: int) -> list[str]:
    share = 100 * max_length / end
    anchor, shift = ("end", -5) if share > 50 else ("start", 5)
    return [
        f'<line class="limit" x1="{share:.3f}%" x2="{share:.3f}%" y1="4" y2="{ground}"/>',
        f'<text class="limit-text" x="{share:.3f}%" dx="{shift}" y="14" text-anchor="{anchor}">'
        f"max_length {max_length:,}</text>",
    ]


def _limit_arrow(max_length: int, ground: int) -> list[str]:
    text = f"max_length {max_length:,} is far to the right →"
    return [f'<text class="limit-text" x="100%" y="14" text-anchor="end">{text}</text>']


def _svg(height: int, what: str, drawn: Sequence[Any]) -> Markup:
    inside = "".join(map(str, drawn))
    return Markup(
        f'<svg role="img" aria-label="{escape(what)}" width="100%" height="{height}">{inside}</svg>'
    )
