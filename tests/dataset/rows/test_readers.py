"""Elements of arrays found by their brackets, whatever the strings hold and wherever a block
ends."""

import io
import json
import random

import pytest

from coati.dataset.rows import readers
from coati.dataset.rows.readers import array_elements


def elements(text: str | bytes) -> list:
    return list(array_elements(io.BytesIO(text if isinstance(text, bytes) else text.encode())))


def value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 5:
        return {f'k"{i}': value(rng, depth + 1) for i in range(rng.randrange(3))}
    return [1, 'a["]{\\,\n]x' * rng.randrange(3), None, "é你\\"][kind]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 50, 1 << 20])
def test_the_elements_are_those_that_json_finds(block, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", block)
    rng = random.Random(block)
    for number in range(60):
        array = [value(rng) for _ in range(rng.randrange(6))]
        text = json.dumps(array, indent=number % 3 or None, ensure_ascii=number % 2 == 0)
        found = elements(b"\xef\xbb\xbf\n " + text.encode() + b"\n \r\n")
        assert [json.loads(element) for _, element in found] == array
        assert "not closed" in elements(text[:-1])[-1][1].detail
        *found, (line, error) = elements(text.encode() + b"\n \n [3]\n")
        assert [json.loads(element) for _, element in found] == array
        assert line == text.count("\n") + 3 and "ends before '[" in error.detail


def test_each_element_has_its_line():
    assert elements('\n[\n {"a":\n 1},\n\n [2\n], 3]') == [
        (3, b'{"a":\n 1}'),
        (6, b"[2\n]"),
        (7, b"3"),
    ]


def test_a_broken_element_spoils_no_other_as_long_as_its_brackets_close():
    text = '[{"a": 1},\n{x},,\n{"b": "no end of the string}\n, 2},\n{"d": 4}]'
    assert elements(text) == [
        (1, b'{"a": 1}'),
        (2, b"{x}"),
        (3, b'{"b": "no end of the string}\n, 2}'),
        (5, b'{"d": 4}'),
    ]
    first, (line, error) = elements('[{"a": 1},\n{"b": 2,\n{"c": 3}]')
    assert first == (1, b'{"a": 1}') and line == 2 and "not closed" in error.detail
