"""The pages of runs in a real browser: nothing fails, nothing is fetched, nothing is too wide or
too pale, and the pointer shows values."""

import shutil

import pytest
from playwright import sync_api as playwright

from coati.trainer.run_report.run_files import open_run
from coati.trainer.run_report.run_page import run_page
from coati.trainer.run_report.side_by_side import side_by_side
from tests.trainer.run_report.made_runs import ARGUMENTS, METRICS, STARTED, event, made_run

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
LEAST_CONTRAST = 4.5  # of text on what is behind it (WCAG 2, AA)
# The contrast of every visible text, the lowest first: [ratio, text].
CONTRAST = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(value => {
      value /= 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if (!color.endsWith(", 0)")) return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.body.querySelectorAll("*")].filter(element =>
    element.checkVisibility() && [...element.childNodes].some(node =>
      node.nodeType === 3 && node.textContent.trim())).map(element => {
    const style = getComputedStyle(element);
    const pair = [element.closest("svg") ? style.fill : style.color, behind(element)].map(light);
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.textContent];
  }).sort((a, b) => a[0] - b[0]);
}"""


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run that has everything, and one of it beside two others."""
    place = tmp_path_factory.mktemp("runs")
    curve = [{"step": n, "train/loss": 3 / n, "train/grad_norm": n % 7} for n in range(1, 300)]
    samples = [
        {"step": step, "prompt": "w" * 200, "response": "x y" * 100, "reward": 0.5}
        for step in (0, 40)
    ]
    arguments = ARGUMENTS | {"a_flag_with_a_long_name": "v" * 200}
    events = [
        STARTED,
        event("warning", 5, text="warning: the loss is still ln 2, in " + "folder/" * 30),
        event("times", 20, seconds={"training": 5.0, "evaluation": 1.0}, elapsed=7.0),
        event("resumed", 150),
        event("failed", 40, text="NonFiniteLoss: the loss is nan"),
    ]
    whole = made_run(
        place / "whole", [*METRICS, *curve], events, samples, arguments, flags_given=["lr"]
    )
    made_run(place / "second", arguments=ARGUMENTS | {"lr": 1.0})
    made_run(place / ("a_run_with_a_long_name_" * 4), events=[STARTED, event("stopped", 7)])
    runs = [open_run(folder) for folder in sorted(place.iterdir())]
    (place / "one.html").write_text(run_page(open_run(whole)), encoding="utf-8")
    (place / "several.html").write_text(side_by_side(runs), encoding="utf-8")
    return place


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=[(390, 844), (1280, 800)], ids=["phone", "desk"])
def page(browser, request, scheme):
    width, height = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 600
    )
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda line: page.faults.append(line.text))
    page.on(
        "request",
        lambda sent: None if sent.url.startswith("file:") else page.faults.append(sent.url),
    )
    yield page
    context.close()


@pytest.mark.parametrize("name", ["one", "several"])
def test_pages_fit_and_are_readable(page, pages, name):
    page.goto(f"file://{pages}/{name}.html")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    palest, text = page.evaluate(CONTRAST)[0]
    assert palest >= LEAST_CONTRAST, text
    letters = page.evaluate(
        "[...document.querySelectorAll('.plot > svg')].map(svg =>"
        " 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
    )
    assert len(letters) >= 5 and min(letters) >= 10  # CSS pixels
    outside = page.evaluate(
        "[...document.querySelectorAll('.plot > svg text')].filter(text => {"
        " const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();"
        " return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;"
        "}).map(text => text.textContent)"
    )
    assert outside == []
    assert page.faults == []


def test_lines_stand_out_from_the_page(page, pages):
    """Three to one, what WCAG 2 asks of graphics."""
    page.goto(f"file://{pages}/several.html")
    page.evaluate(
        "document.querySelectorAll('.chart .line').forEach(line => {"
        " const text = document.createElement('b'); text.textContent = 'line';"
        " text.style.color = getComputedStyle(line).color; document.body.append(text); })"
    )
    lines = [ratio for ratio, text in page.evaluate(CONTRAST) if text == "line"]
    assert len(lines) >= 8 and min(lines) >= 3


def test_the_pointer_shows_the_values_of_a_step(page, pages):
    page.goto(f"file://{pages}/several.html")
    plot = page.locator("figure", has_text="Loss, evaluation").first
    svg = plot.locator("svg").first
    box = svg.bounding_box()
    assert plot.locator(".tip").is_hidden()
    svg.hover(position={"x": box["width"] - 16, "y": box["height"] / 2})
    tip = plot.locator(".tip").inner_text()
    assert tip.startswith("step 40")
    assert "second: 1.625" in tip
    edge = plot.locator(".tip").bounding_box()
    assert edge["x"] >= 0 and edge["x"] + edge["width"] <= page.viewport_size["width"]
    page.mouse.move(0, 0)
    assert plot.locator(".tip").is_hidden()
    assert page.faults == []
