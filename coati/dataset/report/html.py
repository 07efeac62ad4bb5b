"""The report as one self-contained page: no script, font, image or style sheet elsewhere.

All markup and all text is in report.html.jinja, where everything but a chart is escaped.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from coati.dataset.chat.masked_text import visible
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.report.charts import length_charts

HERE = Path(__file__).parent


def page_environment(*folders: Path) -> jinja2.Environment:
    """The templates of ``folders`` and look.css.jinja, all output escaped, with the filters number,
    percent and visible."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": "{:,}".format, "percent": _percent, "visible": visible}
    return environment


@cache
def _template() -> jinja2.Template:
    return page_environment().get_template("report.html.jinja")


def page(report: dict[str, Any]) -> str:
    """The HTML of a report made by ``build_report``."""
    charts = length_charts(report["length_histogram"], report["max_length"])
    return _template().render(report=report, type=DATA_TYPES[report["type"]], charts=charts)


def _percent(share: float) -> str:
    """Shares that are nearly nothing or nearly all are not rounded to it."""
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    return f"{share:.1%}"
