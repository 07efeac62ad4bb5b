"""Chat templates that fail, that have no end, or that would fill memory: each is an error of the
template, named with its cause."""

import resource
import threading
import time

import jinja2
import pytest

from coati.dataset.chat import template
from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.template import compile_template, render_template
from tests.tiny import CHATML, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = DOUBLED %}"
    "{% endfor %}{{ ns.x }}"
)
FAILING = {
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "\n\n{{ 2.0 ** 100000 }}": "OverflowError.*line 3",
    "{{ [1, 'a'] | sort }}": "TypeError",
    "{{ messages() }}": "TypeError",
    "{{ strftime_now(5) }}": "TypeError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ messages[0].content.foo.bar }}": "has no attribute 'foo'",
    "{{ raise_exception('not so') }}": "not so",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}
HUGE = {
    "{{ 'a' * 10 ** 10 }}": "10,000,000,000 characters",
    "{% set n = messages | length * 10 ** 10 %}{{ 'a' * n }}": "10,000,000,000 characters",
    "{{ [0] * 10 ** 10 }}": "10,000,000,000 characters or items",
    "{{ 3 ** 1000000 }}": "characters or items",
    "{{ range(10 ** 9) | list }}": "1,000,000,000",
    "{{ '%1000000000d' % 1 }}": "width",
    "{{ '%*d' % (1000000000, 1) }}": "width",
    "{{ '%1000000000d' | format(1) }}": "width",
    "{{ '{:>1000000000}'.format(1) }}": "width",
    "{{ 'a' | center(10 ** 10) }}": "10,000,000,000",
    "{{ 'a'.ljust(10 ** 10) }}": "10,000,000,000",
    DOUBLING.replace("DOUBLED", "ns.x ~ ns.x"): "characters",
    DOUBLING.replace("DOUBLED", "ns.x + ns.x"): "characters",
    DOUBLING.replace("DOUBLED", "[ns.x, ns.x] | join"): "characters",
    DOUBLING.replace("DOUBLED", "''.join([ns.x, ns.x])"): "characters",
    DOUBLING.replace("DOUBLED", "ns.x | replace('a', 'aa')"): "characters",
    DOUBLING.replace("DOUBLED", "ns.x.replace('a', 'aa')"): "characters",
    DOUBLING.replace("DOUBLED", "'%s%s' % (ns.x, ns.x)"): "characters",
    DOUBLING.replace("DOUBLED", "'%s%s' | format(ns.x, ns.x)"): "characters",
    DOUBLING.replace("DOUBLED", "'{0}{0}'.format(ns.x)"): "characters",
    DOUBLING.replace("DOUBLED", "[ns.x, ns.x] | string"): "characters",
    DOUBLING.replace(
        "{% set ns.x = DOUBLED %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    ): ("characters"),
    "{% macro d(x) %}{{ x ~ x }}{% endmacro %}" + DOUBLING.replace("DOUBLED", "d(ns.x)"): (
        "characters"
    ),
    DOUBLING.replace("'aaaaaaaaaa'", "[0]").replace("DOUBLED", "ns.x + ns.x"): "8,388,608",
    "{% set x = 'a' * 2 ** 25 %}{% for i in range(99999) %}{{ x ~ i }}{% endfor %}": "characters",
}
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}"
)


def refused(text: str, said: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=said):
        render_template(text, MESSAGES, {}, True)


@pytest.mark.parametrize("text", FAILING)
def test_whatever_an_expression_raises_is_an_error_of_the_template(text):
    refused(text, FAILING[text])


@pytest.mark.parametrize("text", HUGE)
def test_expressions_that_would_fill_memory(text):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    refused(text, HUGE[text])
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024


def test_a_macro_takes_large_numbers():
    """Templates write arguments of calls by macros of their own."""
    text = "{% macro written(value) %}{{ value }}{% endmacro %}{{ written(messages) }}"
    assert render_template(text, 10**12, {}, False) == str(10**12)
    with pytest.raises(jinja2.TemplateError, match="makes"):
        render_template("{{ 'a'.ljust(messages) }}", 10**12, {}, False)


def test_a_loop_without_an_end_in_the_main_thread_and_in_another(monkeypatch):
    monkeypatch.setattr(template, "RENDER_S", 0.3)
    refused(ENDLESS, r"longer than 0\.3 s")
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            refused(ENDLESS, r"longer than 0\.3 s")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and not failures


def test_a_template_nested_too_deeply():
    with pytest.raises(ValueError, match="chat_template: cannot be compiled"):
        compile_template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


def test_sums_and_joins_are_jinja_s_own():
    plain = jinja2.Environment()
    names = {"a": "x", "n": 3, "l": [1], "u": None}
    for text in (
        "{{ a + 'y' + a }}",
        "{{ n + 1 + 2 }}",
        "{{ l + [2] + l }}",
        "{{ a ~ n ~ l ~ u }}",
        "{{ (a ~ n) + 'z' ~ (1 + n) }}",
        "{{ 'c' + ('d' + 'e') }}",
        "{{ 'c' + a + 'd' + a + 'e' + a + 'f' + a + 'g' + a }}",
        "{{ a ~ (n + 1 + n) ~ a ~ a ~ a ~ a ~ a ~ a ~ a ~ a }}",
        "{% set b = a + 'y' + a %}{% set c, d = a, l + [2] %}{{ b }}{{ c }}{{ d }}",
        "{{ [a, n, l] | join('-') }}{{ '-'.join(a + a) }}{{ l | join }}{{ missing | join }}",
        "{{ [{'k': 1}, {'k': 2}] | join(',', attribute='k') }}{{ ('<' | e) + '<' + a }}",
        "{{ a | replace('x', 'yy', 1) }}{{ 'xx'.replace('x', 'yy', 1) }}{{ n | replace(3, 4) }}",
        "{% macro m(x) %}[{{ x + 'y' }}]{% endmacro %}{{ m(a) + m(m(a)) }}",
        "{{ 1.5 + n }}",
    ):
        assert compile_template(text).render(names) == plain.from_string(text).render(names)
    with pytest.raises(jinja2.UndefinedError):
        compile_template("{{ 'a' + missing }}").render()


def test_a_conversation_s_error_names_the_tokenizer_s_directory():
    tokenizer = tiny_tokenizer()
    good = Conversation(tokenizer, None, CHATML)
    good.chat_template = "{{ 1 // 0 }}" + CHATML
    with pytest.raises(ValueError, match="ZeroDivisionError") as refusal:
        good.render(MESSAGES)
    assert refusal.type.__name__ == "RowError" and refusal.value.reason == "template_refused"
