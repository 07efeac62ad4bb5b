"""The files of examples/data/formats: the exact messages, responses and labels that each row
becomes, what of it is not read, and what is learned of it."""

import json
from functools import lru_cache
from pathlib import Path

import pytest

from coati.dataset import setup_conversation_template
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import FORMATS_OF, read_row
from coati.dataset.rows.joined_rows import whole_rows
from coati.dataset.rows.readers import decode
from coati.dataset.rows.row_errors import RowError
from tests.dataset.makers import chatml_tokenizer

FILES = Path(__file__).parents[3] / "examples" / "data" / "formats"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
THOUGHT = "Three fours are twelve."
ASKED = "Weather in Ulm?"
SKY = '{"sky": "clear"}'


def talk(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def answer(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def call(city: str, **more) -> dict:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"type": "function", "function": function, **more}


def round_of_calls(said: str = "", system: str | None = None, id: str | None = None, **result):
    """A question, the call of the weather, its result, and the answer."""
    ids = {} if id is None else {"id": id}
    if id is not None:
        result["tool_call_id"] = id
    return [
        *talk(ASKED, system=system),
        answer(said, tool_calls=[call("Ulm", **ids)]),
        {"role": "tool", "content": SKY, **result},
        answer("Clear."),
    ]


def fruit(first: dict, second: dict) -> list[dict]:
    return [*talk("Name a fruit."), answer("Stone.", **first), *talk("No."), answer(**second)]


RIVER = {"messages": talk("Name a river."), "chosen": [answer("The Rhine.")]} | {
    "rejected": [answer("Water.")]
}
SUM = {"messages": talk("1 + 2 = ?"), "chosen": [answer("3")], "rejected": [answer("4")]}
BRIEF_SUM = SUM | {"messages": talk("1 + 2 = ?", system="Be brief.")}
THOUGHT_ROW = {"messages": [*talk("3 * 4 = ?"), answer("12", reasoning_content=THOUGHT)]}
AS_TEXT = {"thought_marks": ["<think>\n", "\n</think>\n\n"]}
SPOKEN_ROW = {"messages": [*talk("3 * 4 = ?"), answer("12", reasoning_content=THOUGHT, **AS_TEXT)]}
TREE_REST = {"prompt.replies[] turned down by reviewers", "message_tree_id", "tree_state"} | {
    f"prompt.replies[].{name}" for name in ("lang", "message_id", "parent_id")
}
MESSAGES_REST = {"turned down by reviewers", "message_tree_id", "message_id", "parent_id", "lang"}
RATINGS = {"correctness", "coherence", "complexity", "verbosity"}
OWL = {"messages": talk("Name a bird."), "chosen": [answer("An owl.")]} | {
    "rejected": [answer("Bird.")]
}
SHP_REST = {"post_id", "score_A", "score_B", "score_ratio"}
# What each row of each file becomes; "unused" are the names of what is not read.
EXPECTED: dict[str, list[dict]] = {
    "sft_question_answer": [
        {"messages": talk("Name a river.", "The Rhine.")},
        {
            "messages": talk(
                "Name a river.", "The Rhine.", "And a lake?", "Lake Constance.", system="Be brief."
            )
        },
        {"messages": talk("Name a hill.", "The Wartberg.")},
        {"messages": talk("Add 1 and 2.", "3")},
        {"messages": talk("3 * 4 = ?", r"Three fours are \boxed{12}.")},
        {"messages": talk("Which is red?\n\nA. sky\nB. blood", "B")},
    ],
    "sft_dolly": [
        {
            "messages": talk("Who is taller?\n\nAnn is 180 cm, Bo is 170 cm.", "Ann."),
            "category": "closed_qa",
        },
        {"messages": talk("Name a bird.", "An owl."), "category": "open_qa"},
    ],
    "sft_openorca": [
        {
            "messages": talk(
                "Why is the sky blue?",
                "Air scatters blue light most.",
                system="You explain to a child.",
            ),
            "unused": {"id"},
        },
        {"messages": talk("Is ice lighter than water?", "Yes, so it floats."), "unused": {"id"}},
    ],
    "sft_firefly": [
        {
            "messages": talk("Name a tree.", "An oak.", "One more.", "A birch."),
            "category": "Brainstorming",
            "unused": {"conversation_id"},
        },
        {"messages": talk("Name a stone.", "Granite."), "unused": {"kind"}},
        {"messages": talk("Name a metal.", "Iron.", system="Be brief.")},
    ],
    "sft_nemotron": [
        {
            "messages": [
                *talk("2 + 5 = ?", system="detailed thinking on"),
                answer("7", reasoning_content="Two and five are seven.", **AS_TEXT),
            ],
            "category": "math",
            "unused": {"reasoning"},
        },
        {
            "messages": talk("Say hi.", "Hi!", system="detailed thinking off"),
            "category": "chat",
            "unused": {"reasoning"},
        },
    ],
    "sft_thoughts": [*[THOUGHT_ROW] * 4, SPOKEN_ROW, THOUGHT_ROW],
    "sft_tools_openai": [
        {"messages": round_of_calls(system="Be brief.", id="call_1"), "tools": TOOLS},
        {"messages": round_of_calls(name="get_weather"), "tools": TOOLS},
    ],
    "sft_tools_sharegpt": [{"messages": round_of_calls(), "tools": TOOLS}],
    "sft_tools_hermes": [{"messages": round_of_calls(), "tools": TOOLS}],
    "sft_tools_anthropic": [{"messages": round_of_calls("I look.", id="toolu_1"), "tools": TOOLS}],
    "sft_glaive": [
        {"messages": round_of_calls(system="You are a helpful assistant."), "tools": TOOLS},
        {"messages": talk("Say hi.", "Hi!", system="You are a helpful assistant.")},
    ],
    "sft_xlam": [
        {
            "messages": [
                *talk("Weather in Ulm and Bonn?"),
                answer("", tool_calls=[call("Ulm"), call("Bonn")]),
            ],
            "tools": TOOLS,
            "unused": {"id"},
        }
    ],
    "sft_weights": [
        {"messages": fruit({"weight": 0.0}, {"content": "Apple.", "weight": 1.0})},
        {
            "messages": fruit(
                {"weight": 0.0},
                {"content": "Apple, I think.", "spans": [[0, 5, 1.0], [5, 15, 0.0]]},
            )
        },
        {"messages": fruit({"weight": 0.0}, {"content": "Apple.", "weight": 1.0})},
        {
            "messages": [
                {"role": "user", "content": "Name a fruit.", "weight": 0.0},
                answer("Apple.", weight=0.5),
            ]
        },
    ],
    "sft_oasst": [
        {
            "messages": talk("Name a river.", "The Rhine.", "One more.", "The Main."),
            "branches": [talk("Name a river.", "Water.")],
            "unused": TREE_REST,
        }
    ],
    "preference_oasst": [RIVER | {"unused": TREE_REST}],
    "sft_oasst_messages": [
        {
            "messages": talk("Name a river.", "Water."),
            "branches": [talk("Name a river.", "The Rhine.", "One more.", "The Main.")],
            "unused": MESSAGES_REST,
        }
    ],
    "preference_oasst_messages": [RIVER | {"unused": MESSAGES_REST}],
    "sft_helpsteer_ratings": [
        {
            "messages": talk("Name a river.", "The Rhine."),
            "unused": {"response beside the best", *RATINGS},
        },
        {
            "messages": talk("Name a bird.", "An owl."),
            "unused": {"response beside the best", *RATINGS},
        },
    ],
    "preference_helpsteer_ratings": [
        RIVER | {"unused": {"response between the best and the worst", *RATINGS}},
        OWL | {"unused": RATINGS},
    ],
    "preference_distilabel": [BRIEF_SUM | {"unused": {"generations", "ratings"}}, RIVER],
    "preference_chosen_response": [SUM],
    "preference_ms_swift": [BRIEF_SUM, SUM],
    "preference_ultrafeedback": [
        RIVER
        | {
            "chosen": [answer("The Rhine, in Germany.")],
            "unused": {
                "completions between the best and the worst",
                "completions[].model",
                "models",
            },
        },
        SUM,
        OWL,
    ],
    "preference_pku": [
        RIVER | {"unused": {"is_response_0_safe", "is_response_1_safe", "safer_response_id"}}
    ],
    "preference_shp": [
        {
            "messages": talk("Which river is long?"),
            "chosen": [answer("The Nile.")],
            "rejected": [answer("Water.")],
            "unused": SHP_REST,
        },
        {
            "messages": talk("Which river is short?"),
            "chosen": [answer("The Pader.")],
            "rejected": [answer("No.")],
            "unused": SHP_REST,
        },
    ],
    "preference_helpsteer": [
        RIVER | {"unused": {"split", "preference_statement"}},
        RIVER | {"unused": {"domain", "language"}},
    ],
    "prompt_gsm8k": [
        {"messages": talk("3 * 4 = ?"), "gt_answer": "12"},
        {"messages": talk("1000 + 234 = ?"), "gt_answer": "1234"},
    ],
    "prompt_math": [
        {
            "messages": talk("What is half of one?"),
            "gt_answer": r"\frac{1}{2}",
            "unused": {"level", "type"},
        }
    ],
    "prompt_verl": [
        {
            "messages": talk("3 * 4 = ?"),
            "gt_answer": "12",
            "unused": {"data_source", "ability", "extra_info", "reward_model.style"},
        }
    ],
    "prompt_openr1": [
        {
            "messages": talk("3 * 4 = ?"),
            "gt_answer": "12",
            "unused": {"solution", "problem_type", "source"},
        }
    ],
    "prompt_choices": [
        {"messages": talk("Which is red?\n\nA. sky\nB. blood"), "gt_answer": "B"},
        {"messages": talk("Which is blue?\n\nA. sky\nB. blood"), "gt_answer": "A"},
        {"messages": talk("Which is green?\n\nA. grass\nB. blood"), "gt_answer": "A"},
    ],
    "prompt_context": [
        {
            "messages": talk("Who is taller?\n\nAnn is 180 cm, Bo is 170 cm."),
            "unused": {"response"},
        },
        {"messages": talk("1 + 2 = ?", system="Answer in French."), "unused": {"response"}},
        {"messages": talk("3 * 4 = ?"), "gt_answer": "12"},
    ],
    "kto_messages": [
        {"messages": talk("1 + 2 = ?"), "completion": "3", "label": True},
        {
            "messages": talk("2 + 2 = ?", system="Be brief."),
            "completion": "5",
            "label": False,
        },
        {"messages": talk("2 + 2 = ?"), "completion": "5", "label": False},
    ],
    "kto_alpaca": [
        {"messages": talk("1 + 2 = ?"), "completion": "3", "label": True},
        {"messages": talk("2 + 2 = ?"), "completion": "5", "label": False},
        {"messages": talk("2 + 2 = ?"), "completion": "5", "label": False},
    ],
}
NOTHING = {"chosen": [], "rejected": [], "completion": None, "label": None, "tools": None} | {
    "gt_answer": None,
    "text": None,
    "category": None,
    "branches": [],
}


@lru_cache
def rows_of(name: str) -> list:
    return [decode(row) for _, row in whole_rows(FILES / f"{name}.jsonl")]


def in_files() -> set[tuple[str, str]]:
    """(type, format) of every row of the files, read as its type and as a prompt."""
    seen = set()
    for name in EXPECTED:
        for row in rows_of(name):
            for type in (name.partition("_")[0], "prompt"):
                seen.add((type, read_row(type, row).format))
    return seen


def test_every_file_has_what_it_becomes():
    assert {path.stem for path in FILES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_row_is_read_exactly(name):
    type = name.partition("_")[0]
    assert len(rows_of(name)) == len(EXPECTED[name])
    for row, expected in zip(rows_of(name), EXPECTED[name], strict=True):
        before = json.dumps(row)
        found = read_row(type, row)
        expected = NOTHING | expected
        unused = expected.pop("unused", set())
        shown = {key: getattr(found, key) for key in expected}
        shown["branches"] = [branch.messages for branch in found.branches]
        assert shown == expected
        assert set(found.unused) == unused and not any(found.unused.values())
        assert read_row(type, row, found.format) == found and found.format in FORMATS_OF[type]
        assert json.dumps(row) == before


@pytest.fixture(scope="module")
def conversation():
    return setup_conversation_template(chatml_tokenizer(), {})


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("sft")])
def test_the_responses_alone_are_learned(name, conversation):
    for row in rows_of(name):
        found = read_row("sft", row)
        if found.tools or any("weight" in m or "spans" in m for m in found.messages):
            continue
        (columns, cut) = DATA_TYPES["sft"].tokenize(found, conversation, 2000)[-1]
        said = [one for one in found.messages if one["role"] == "assistant"]
        expected = []
        for one in said:
            thought = one.get("reasoning_content")
            before = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
            expected.append(f"{before}{one['content']}<|im_end|>")
        assert (columns["labels_decode"], cut) == (expected, False)


WITH_TOOLS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
ROUND = [CALLED % "Ulm" + "<|im_end|>", "Clear.<|im_end|>"]
LEARNED = {
    "sft_tools_openai": [ROUND, ROUND],
    "sft_tools_sharegpt": [ROUND],
    "sft_tools_hermes": [ROUND],
    "sft_tools_anthropic": [["I look." + ROUND[0], ROUND[1]]],
    "sft_glaive": [ROUND, ["Hi!<|im_end|>"]],
    "sft_xlam": [[CALLED % "Ulm" + CALLED % "Bonn" + "<|im_end|>"]],
    "sft_weights": [["Apple.<|im_end|>"], ["Apple<|im_end|>"], *[["Apple.<|im_end|>"]] * 2],
}


@pytest.mark.parametrize("name", LEARNED)
def test_calls_and_what_weighs_something_are_learned(name):
    """Neither the schemas, nor results, nor turns of weight 0."""
    template = setup_conversation_template(chatml_tokenizer(), {"chat_template": WITH_TOOLS})
    for row, learned in zip(rows_of(name), LEARNED[name], strict=True):
        found = read_row("sft", row)
        (columns, cut) = DATA_TYPES["sft"].tokenize(found, template, 2000)[-1]
        assert (columns["labels_decode"], cut) == (learned, False)
        assert ("get_weather" in columns["inputs_decode"]) == bool(found.tools)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("kto")])
def test_what_is_judged_never_becomes_a_row_to_imitate(name):
    for row in rows_of(name):
        with pytest.raises(RowError) as error:
            read_row("sft", row)
        assert error.value.reason == "wrong_type" and "for --type kto" in error.value.detail


def test_the_remedy_for_a_label_that_judges_nothing():
    from coati.dataset.rows.column_names import Layout, parse_columns

    row = {"messages": talk("Name a river.", "The Rhine."), "label": 1}
    with pytest.raises(RowError, match="prepare with --columns label=$") as error:
        read_row("sft", row)
    flag = str(error.value).rpartition("--columns ")[2]
    found = read_row("sft", row, layout=Layout(parse_columns([flag])))
    assert found.messages == row["messages"] and found.unused == {}
    # A label that is no judgment, a topic for instance, is named.
    assert read_row("sft", row | {"label": "rivers"}).unused == {"label": True}


def test_what_is_turned_down_by_a_flag_is_left_out():
    row = {"messages": talk("Name a river.", "Water."), "is_correct": False}
    with pytest.raises(RowError, match="is_correct is false; .*--columns is_correct=$") as error:
        read_row("sft", row)
    assert error.value.reason == "judged_bad"
    assert read_row("sft", {**row, "is_correct": True}).unused == {"is_correct": False}
    assert (read_row("kto", row).label, read_row("kto", row).completion) == (False, "Water.")
    assert read_row("prompt", row).messages == talk("Name a river.")
    # Not every number is a flag.
    assert read_row("sft", {**row, "is_correct": 0}).unused == {"is_correct": False}
