"""The chat page in a real browser: sending, streaming, stopping, reloading, settings, a phone's
width."""

import json
import os
import shutil

import pytest
from playwright import sync_api as playwright

from tests.inference.serve.test_tool_calls import TOOLS, parrot_server
from tests.inference.serving import running, until

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SHOTS = os.environ.get("COATI_SCREENSHOTS")  # a folder to look at them in


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    with running(endless=True, pause=0.02, web={"max_new_tokens": 30}, max_length=256) as server:
        yield server


@pytest.fixture(params=[(390, 844), (1280, 800)], ids=["phone", "desk"])
def page(browser, server, request):
    width, height = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=width < 600
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda line: page.faults.append(line.text) if line.type == "error" else None)
    own = (server.url, "data:")
    page.on(
        "request", lambda sent: None if sent.url.startswith(own) else page.faults.append(sent.url)
    )
    page.goto(server.url)
    holds(page, "document.querySelector('#model').textContent === 'tiny'")
    yield page
    context.close()


def holds(page, expression):
    """Wait until ``expression`` is true. Playwright's own waiting needs eval, which the page's
    policy forbids."""
    for _ in range(800):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never true: {expression}")


def send(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page, count=1):
    """Wait for ``count`` whole answers; the last one's text."""
    holds(
        page,
        f"document.querySelectorAll('article.assistant').length === {count} && "
        "!document.querySelector('.writing') && document.querySelector('#send').textContent === "
        "'Send'",
    )
    return page.locator("article.assistant").last.locator(".text, pre").all_inner_texts()


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{page.viewport_size['width']}_{name}.png")


def test_send_stream_and_reload(page):
    shot(page, "empty")
    send(page, "hello there")
    page.wait_for_selector(".writing")
    holds(page, "document.querySelector('.writing .text')?.textContent.length > 2")  # it streams
    shot(page, "writing")
    answer = answered(page)
    assert "cut off at the longest answer" in page.locator(".note").inner_text()
    send(page, "and again")
    assert answered(page, 2)
    shot(page, "answered")
    page.reload()
    assert page.locator("article").count() == 4
    assert page.locator("article.user").first.inner_text().endswith("hello there")
    assert page.locator("article.assistant").first.locator(".text, pre").all_inner_texts() == answer
    page.click("#new")
    assert page.locator("article").count() == 0 and page.locator("#empty").is_visible()
    page.reload()
    assert page.locator("article").count() == 0
    assert page.faults == []


def test_stop_keeps_what_was_written_and_frees_the_place(page, server):
    page.click("#adjust")
    page.fill("[name=max_tokens]", "30")
    send(page, "hello")
    holds(page, "document.querySelector('.writing .text')?.textContent.length > 2")
    page.click("#send")  # now Stop
    assert answered(page) and page.locator(".note").inner_text() == "stopped"
    assert until(lambda: server.engine.running == 0, 5)
    send(page, "go on")  # the dialogue goes on from there
    assert answered(page, 2)
    assert page.faults == []


def test_nothing_is_wider_than_the_screen(page):
    page.click("#adjust")
    shot(page, "settings")
    messages = [
        {"role": "user", "content": "w" * 300},
        {
            "role": "assistant",
            "content": "Look:\n```python\n" + "x" * 300 + "\n```\nand <b>this</b> " + "y" * 300,
        },
    ]
    page.evaluate(
        "messages => localStorage.setItem('coati.messages', JSON.stringify(messages))", messages
    )
    page.reload()
    page.wait_for_selector("pre")
    shot(page, "long")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "<b>this</b>" in page.locator("article.assistant").inner_text()  # text, never markup
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    page.click("#theme")
    shot(page, "other_theme")


ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<svg onload='window.hit=1'><script>window.hit=1</script></svg>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<details open ontoggle='window.hit=1'>x</details>",
    "<math><mtext><table><mglyph><style><img src=x onerror='window.hit=1'>",
    "<a href='javascript:window.hit=1'>x</a>",
    "<style>body { display: none }</style>",
    "<form action='https://elsewhere.example'><input name=q autofocus onfocus='window.hit=1'>",
    "<base href='https://elsewhere.example/'>",
    "<link rel=stylesheet href='//elsewhere.example/x.css'>",
    "[x](javascript:window.hit=1)",
    "[x](JaVaScRiPt&colon;window.hit=1)",
    "[x](&#106;avascript:window.hit=1)",
    "[x](data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGl0PTE8L3NjcmlwdD4=)",
    "[x](vbscript:window.hit=1)",
    "[x](file:///etc/passwd)",
    "[x](/v1/models)",
    "[x](<javascript:window.hit=1>)",
    "[x]: javascript:window.hit=1\n\n[x]",
    "<javascript:window.hit=1>",
    "![x](https://elsewhere.example/pixel.png)",
    "![x](x' onerror='window.hit=1)",
    "[x](https://a.example/' onmouseover='window.hit=1)",
    '[x](https://a.example "t" onmouseover="window.hit=1")',
    "```<img src=x onerror=window.hit=1>\n<script>window.hit=1</script>\n```",
    '```x" onmouseover="window.hit=1\ncode\n```',
    "`<img src=x onerror=window.hit=1>`",
    "|<script>window.hit=1</script>|\n|-|\n|<img src=x onerror=window.hit=1>|",
    "</div></article></main><script>window.hit=1</script>",
    "&lt;script&gt;window.hit=1&lt;/script&gt;",
]
ALLOWED = (
    "p br hr strong em s code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th td "
    "a div"
)


def shown(page, *answers):
    """The page with these answers; the last one's text."""
    turns = [
        turn
        for answer in answers
        for turn in ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
    ]
    page.evaluate("turns => localStorage.setItem('coati.messages', JSON.stringify(turns))", turns)
    page.reload()
    page.wait_for_selector("article.assistant .markdown")
    return page.locator("article.assistant .markdown").last


def test_nothing_of_an_answer_is_read_as_html(page):
    shown(page, *ATTACKS)
    page.wait_for_timeout(200)
    for link in page.locator("article a").all():
        link.hover()
    assert page.evaluate("window.hit") is None and page.faults == []
    found = page.evaluate(
        "[...document.querySelectorAll('.markdown, .markdown *')].map(e => "
        "[e.tagName.toLowerCase(), [...e.attributes].map(a => a.name)])"
    )
    assert {tag for tag, _ in found} <= set(ALLOWED.split())
    names = {name for _, attributes in found for name in attributes}
    assert names <= {"class", "tabindex", "href", "title", "align", "start", "rel", "target"}
    links = page.evaluate(
        "[...document.querySelectorAll('.markdown a')].map(a => [a.getAttribute('href'), a.rel])"
    )
    assert links and all(href.startswith("https://") for href, _ in links)
    assert {rel for _, rel in links} == {"noopener noreferrer nofollow"}
    assert page.locator("#question").is_visible()


def test_markdown_is_rendered(page):
    answer = shown(
        page,
        "# Title\n\nSome *soft* and **strong** text,\na second line and `a < b`.\n\n"
        "1. one\n2. two\n\n> quoted\n\n| name | count |\n| :-- | --: |\n| a | 10 |\n"
        "\n```python\nif a < b:\n    print('<b>')\n```\n\nSee https://example.com/x or [mail]"
        "(mailto:a@b.example).",
    )
    shot(page, "markdown")
    assert answer.locator("h1").inner_text() == "Title"
    assert answer.locator("pre").inner_text() == "if a < b:\n    print('<b>')\n"
    assert answer.locator("li").all_inner_texts() == ["one", "two"]
    assert answer.locator("td").last.get_attribute("align") == "right"
    assert answer.locator("p br").count() == 1 and answer.locator("p code").inner_text() == "a < b"
    hrefs = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert hrefs == ["https://example.com/x", "mailto:a@b.example"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.faults == []


def told(page, *deltas, finish="stop"):
    """Let the server answer with these deltas."""
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.unroute("**/v1/chat/completions")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )


def said(page, *pieces, finish="stop"):
    """Let the server answer with these pieces."""
    told(page, *({"content": piece} for piece in pieces), finish=finish)


def test_thoughts_are_folded_and_calls_wait_for_their_results(page):
    page.click("#adjust")
    page.fill("[name=tools]", '[{"name": "weather", "parameters": {}}]')
    page.click("#adjust")
    call = {"name": "weather", "arguments": ""}
    told(
        page,
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Look <b>it</b> "},
        {"reasoning_content": "up."},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": call}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Oslo"}'}}]},
        finish="tool_calls",
    )
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "Weather in Oslo?")
    assert sent.value.post_data_json["tools"] == [
        {"type": "function", "function": {"name": "weather", "parameters": {}}}
    ]
    holds(page, "document.querySelector('.call pre')?.textContent.includes('Oslo')")
    holds(page, "!document.querySelector('.writing')")
    assert page.locator(".thought").get_attribute("open") is None
    assert page.locator(".thought .said").text_content() == "Look <b>it</b> up."
    assert page.locator(".thought .said").is_hidden() and page.locator(".nothing").count() == 0
    assert page.inner_text(".call strong") == "weather"
    assert page.inner_text(".call pre") == '{\n  "city": "Oslo"\n}'
    shot(page, "call")
    page.click(".thought summary")
    assert page.locator(".thought .said").is_visible()
    assert page.get_attribute("#question", "placeholder") == "Result of weather"
    told(page, {"content": "It has 5 degrees."})
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "5 degrees")
    assert sent.value.post_data_json["messages"] == [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Look <b>it</b> up.",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "content": "5 degrees", "tool_call_id": "a"},
    ]
    answered(page, 2)
    assert page.locator("article.tool").inner_text().endswith("Result of weather\n5 degrees")
    page.reload()
    assert page.locator("article.tool").count() == 1 and page.locator(".call").count() == 1
    assert page.get_attribute("#question", "placeholder") == "Message"
    page.click("#adjust")
    page.fill("[name=tools]", "{")
    send(page, "once more")
    page.wait_for_selector("#notice:visible")
    assert page.inner_text("#notice") == "Tools: expected a JSON list of function schemas"
    assert page.faults == []


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)], ids=["phone", "desk"])
def test_two_calls_of_a_model_get_their_results_in_turn(browser, width, height):
    """With a server whose model writes two calls in one turn, then a call that is broken."""
    calls = [
        f'<|tool_call>call:get_weather{{"city": "{city}", "days": 3}}<tool_call|>'
        for city in ("Oslo", "Rome")
    ]
    with parrot_server("gemma_4") as server:
        context = browser.new_context(viewport={"width": width, "height": height})
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.goto(str(server.client.base_url).removesuffix("v1/"))
        holds(page, "document.querySelector('#model').textContent === 'tiny'")
        page.click("#adjust")
        page.fill("[name=tools]", json.dumps(TOOLS))
        page.click("#adjust")
        server.model.answer = "<|channel>thought\nTwo cities.\n<channel|>I look.\n" + "".join(calls)
        send(page, "Where is it warm?")
        holds(page, "document.querySelectorAll('.call').length === 2")
        holds(page, "!document.querySelector('.writing')")
        assert "Rome" in page.locator(".call pre").nth(1).inner_text()
        server.model.answer = "In Rome. " + calls[0].replace("}", "")
        send(page, "4 C")
        assert page.locator("article.assistant").count() == 1  # the second result is missing
        assert page.get_attribute("#question", "placeholder") == "Result of get_weather"
        send(page, "19 C")
        assert answered(page, 2)[0].startswith("In Rome.")
        shown = page.locator("article.assistant").nth(1).inner_text()
        assert 'call:get_weather{"city": "Oslo", "days": 3' in shown  # a broken call is text
        prompt = server.model.prompts[-1]
        assert prompt.index("Oslo") < prompt.index("Rome") < prompt.index("4 C")
        assert prompt.index("4 C") < prompt.index("19 C")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/two_calls_{width}.png", full_page=True)
        context.close()


def test_an_empty_answer_is_said_and_not_sent_on(page):
    said(page)
    send(page, "hello")
    assert answered(page) == ["(empty response)"]
    shot(page, "nothing")
    page.reload()
    assert page.locator("article .nothing").count() == 1
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "once more")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "once more"}]
    answered(page, 2)


def test_a_long_answer_is_not_rendered_for_every_piece(page):
    pieces = [f"word {number} **b**\n\n" for number in range(3000)]
    said(page, *pieces)
    page.evaluate(
        "() => { window.rendered = 0; const own = markdown.render.bind(markdown); "
        "markdown.render = (text) => { window.rendered += 1; return own(text); }; }"
    )
    send(page, "hello")
    answered(page)
    assert page.locator("article.assistant strong").count() == 3000
    assert page.evaluate("window.rendered") < 100


def test_settings_go_with_the_request_and_stay(page):
    page.click("#adjust")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=seed]", "7")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "hello")
    body = sent.value.post_data_json
    assert (body["temperature"], body["seed"], body["stream"]) == (0.5, 7, True)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    answered(page)
    page.reload()
    page.click("#adjust")
    assert page.input_value("[name=temperature]") == "0.5"
    page.fill("[name=temperature]", "5")
    send(page, "once more")
    page.wait_for_selector("#notice:visible")
    assert (
        "Temperature" in page.inner_text("#notice") and page.input_value("#question") == "once more"
    )


def test_a_dialogue_that_outgrows_the_model_loses_its_oldest_rounds(page):
    for turn in range(4):
        send(page, "hello there, how are you " * 5)
        answered(page, turn + 1)
    assert "oldest rounds were left out" in page.locator(".note").last.inner_text()
    assert page.locator("#notice").is_hidden()


def test_a_server_that_is_gone_is_said_and_the_question_kept(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "are you there?")
    page.wait_for_selector("#notice:visible")
    assert page.inner_text("#notice") == "The server cannot be reached."
    assert (
        page.input_value("#question") == "are you there?" and page.locator("article").count() == 0
    )


def test_every_control_has_a_name_and_the_keyboard_suffices(page):
    page.click("#adjust")
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => "
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert page.get_attribute("#adjust", "aria-expanded") == "true"
    page.focus("#question")
    page.keyboard.type("hello")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    answered(page)


def test_a_token_is_asked_for(browser):
    with running(web={"token": "sesame"}) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("[name=token]:visible")
        assert "wrong or missing token" in page.inner_text("#notice")
        page.fill("[name=token]", "sesame")
        page.press("[name=token]", "Tab")
        holds(page, "document.querySelector('#model').textContent === 'tiny'")
        assert page.locator("#notice").is_hidden()
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        context.close()
