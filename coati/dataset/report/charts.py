"""The length histogram of the report page, drawn by matplotlib as SVG to stand inside HTML."""

import io
import re
from collections.abc import Sequence

from markupsafe import Markup

HEIGHT = 250  # units of the view box; at its intended width one unit is one CSS pixel
# Width on a desktop and on a phone, where the letters of the wide chart would shrink.
WIDTHS = {"wide": 860, "narrow": 420}
# Colors to draw with; the page's CSS variables take their place, so that charts go dark with it.
BARS = "#010101"
LIMIT = "#020202"
INK = "#030303"
GRID = "#040404"
VARIABLES = {BARS: "--kept", LIMIT: "--limit", INK: "--faint", GRID: "--line"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "coati",  # element ids do not differ between runs
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def length_charts(bars: Sequence[dict[str, int]], max_length: int) -> list[tuple[str, Markup]]:
    """``(CSS class, chart)`` for each width of screen; none without ``bars``, the report's
    ``length_histogram``."""
    if not bars:
        return []
    return [(name, length_chart(bars, max_length, width)) for name, width in WIDTHS.items()]


def length_chart(bars: Sequence[dict[str, int]], max_length: int, width: int) -> Markup:
    """Rows by length in tokens, with a line at ``max_length``.

    A limit far beyond the longest row would squeeze the bars; an arrow points at it instead.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    step = bars[0]["to"] - bars[0]["from"] + 1
    last = bars[-1]
    xlabel = "tokens per row"
    if last["to"] - last["from"] + 1 > step:
        xlabel += f" (the last bar: {last['from']:,} to {last['to']:,})"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, HEIGHT / 72))
        # Margins by hand: a layout engine would draw everything several times, a tenth of a second
        # of every preparation.
        digits = len(f"{max(bar['rows'] for bar in bars):,}")
        figure.subplots_adjust(
            left=(38 + 8 * digits) / width,
            right=1 - 14 / width,
            top=1 - 30 / HEIGHT,
            bottom=46 / HEIGHT,
        )
        axes = figure.subplots()
        edges = [bar["from"] - 1 for bar in bars] + [len(bars) * step]
        axes.stairs([bar["rows"] for bar in bars], edges, fill=True, color=BARS, clip_on=False)
        axes.set(xlabel=xlabel, ylabel="rows", xlim=(0, edges[-1]))
        axes.tick_params(bottom=False, left=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
            axis.set_major_formatter("{x:,.0f}")
        _mark_limit(axes, max_length, last["from"] + step / 2)
        for line in axes.get_ygridlines():
            line.set_clip_on(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata=NO_METADATA)
    return _inline(drawn.getvalue(), f"Rows by length in tokens; max_length is {max_length:,}")


def _mark_limit(axes, max_length: int, longest: float) -> None:
    text = f"max_length {max_length:,}"
    if max_length > 1.5 * longest:
        axes.set_title(f"{text} is far to the right \N{RIGHTWARDS ARROW}", color=LIMIT, loc="right")
        axes.title.set_fontsize(12)
        return
    axes.set_xlim(right=max(axes.get_xlim()[1], max_length))
    axes.axvline(max_length, color=LIMIT, linewidth=2, linestyle="--", clip_on=False)
    on_the_right = max_length > axes.get_xlim()[1] / 2
    axes.annotate(
        text,
        (max_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if on_the_right else 5, 4),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        color=LIMIT,
    )


def _inline(svg: str, label: str) -> Markup:
    """An SVG file as an element of a page: no document head, fonts or colors of its own."""
    box, shapes = re.search(r'viewBox="([^"]+)".*?>(.*)</svg>', svg, re.DOTALL).groups()
    for ours in (r"(?s)<defs>.*?</defs>", r' id="[^"]*"', r'font(-size|-family)?: [^;"]+;? ?'):
        shapes = re.sub(ours, "", shapes)
    shapes = re.sub(r"\n\s*", " ", shapes)
    for color, variable in VARIABLES.items():
        shapes = shapes.replace(color, f"var({variable})")
    return Markup('<svg role="img" aria-label="{}" viewBox="{}">{}</svg>').format(
        label, box, Markup(shapes)
    )
