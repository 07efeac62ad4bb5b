"""What templates leave out of texts without a word: an answer before a closing tag of thoughts, and
parts of the schemas of tools. Both are found by probes, counted, and named."""

import pytest

from coati.dataset.chat.dialogue import ADDED, DROPPED, LEFT_OUT
from coati.dataset.chat.schema_parts import (
    SCHEMA_PART,
    SCHEMAS_DROPPED,
    lost_parts,
    parts_of,
)
from coati.dataset.report.rendering_warnings import rendering_warnings
from coati.dataset.rows.row_errors import RowError
from tests.dataset.chat import call_templates
from tests.dataset.chat.family_templates import (
    TOKENS,
    TOOLS,
    answer,
    call,
    checked,
    family,
    learned,
    result,
    user,
)

CUTTING = ("deepseek_r1", "deepseek_v3_1", "exaone_4")
SPOKEN = [user("1+1?"), answer("One and one.</think>2")]
DEFINED = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {"type": "string", "enum": ["Oslo"]}},
        },
    },
}


@pytest.mark.parametrize("name", CUTTING)
def test_a_text_that_is_cut_off_is_a_dropped_thought(name):
    template = family(name)
    (row,) = template.encode_turns(SPOKEN)
    assert "One and one." not in row.text and row.notes >= {DROPPED}
    assert learned(template, row)[0].replace("</think>", "").startswith("2")
    assert DROPPED in template.encode_response(SPOKEN).notes
    with pytest.raises(RowError, match="message 1"):
        family(name, thoughts="refuse").encode_turns(SPOKEN)
    dropped = family(name, thoughts="drop").encode_turns(SPOKEN)[0]
    assert LEFT_OUT in dropped.notes and dropped.input_ids == row.input_ids
    kept = family(name, thoughts="keep")
    (whole,) = kept.encode_turns(SPOKEN)
    assert ADDED in whole.notes and "One and one.\n</think>\n\n2" in learned(kept, whole)[0]
    said = checked(name).warnings
    assert any(
        "what stands before '</think>' in an answer is taken for a thought" in s for s in said
    )
    # What the model writes and the user types is never cut.
    begun = template.encode_prompt(SPOKEN[:1], begun=SPOKEN[1]["content"]).text
    assert begun.endswith(SPOKEN[1]["content"])
    asked = [user(SPOKEN[1]["content"]), answer("2")]
    assert DROPPED not in template.encode_turns(asked)[0].notes


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("text", ["A1</think>B2", "A1</think>B2</think>C3"])
def test_no_template_loses_a_part_of_an_answer_unnoted(name, text):
    template = family(name)
    if name == "nemotron_3":  # its prompt opens a thought, which such a text does not
        with pytest.raises(RowError, match="changes an earlier turn"):
            template.encode_turns([user("q"), answer(text)])
        return
    (row,) = template.encode_turns([user("q"), answer(text)])
    whole = all(part in row.text for part in text.split("</think>"))
    assert whole == (DROPPED not in row.notes), row.text
    assert text in row.text or name in (*CUTTING, "qwen3", "glm4_5")


def test_weights_of_parts_move_with_what_is_cut_off():
    template = family("exaone_4")
    said = "A</think>two words"
    spans = [[0, len("A</think>"), 1.0], [len("A</think>two"), len(said), 0.0]]
    weighed = answer(said, spans=spans)
    (row,) = template.encode_turns([user("q"), weighed])
    assert learned(template, row) == ["two[|endofturn|]"]


def test_parts_of_schemas_that_are_not_written_are_counted_and_named():
    for name in ("gemma_4", "nemotron_3", "deepseek_v3_1"):
        template = family(name)
        assert template.abilities.lost_parts == {"function.description"}
        calls = [user("Warm?"), call({"city": "Oslo"}), result("4 C"), answer("No.")]
        notes = template.encode_turns(calls, tools=TOOLS)[-1].notes
        assert notes >= {SCHEMAS_DROPPED, f"{SCHEMA_PART}function.description"}
        assert SCHEMAS_DROPPED in template.encode_response(calls, tools=TOOLS).notes
        assert SCHEMAS_DROPPED not in template.encode_turns(calls, tools=[DEFINED])[-1].notes
        assert any(
            "schemas of tools function.description are not" in s for s in checked(name).warnings
        )
    bare = call_templates.conversation_of("gemma_4_bare")
    lost = {"parameters.$defs", "argument.$ref", "field.enum", "argument.default"}
    assert lost < bare.abilities.lost_parts
    (row,) = bare.encode_turns([user("Warm?"), answer("No.")], tools=[DEFINED])
    named = {SCHEMA_PART + part for part in ("parameters.$defs", "argument.$ref", "argument.enum")}
    assert row.notes == {SCHEMAS_DROPPED, *named}
    traits = dict.fromkeys(row.notes, 7)
    (said,) = rendering_warnings({"traits": traits, "dropped": {}, "type": "sft"})
    assert "in 7 rows (part and rows: argument.$ref 7, argument.enum 7, parameters.$defs 7)" in said


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "kimi_k2", "granite_4"])
def test_templates_that_write_schemas_whole_lose_nothing(name):
    template = family(name)
    assert not template.abilities.lost_parts
    row = template.encode_turns([user("Warm?"), answer("No.")], tools=[DEFINED])[-1]
    assert SCHEMAS_DROPPED not in row.notes


def test_which_parts_are_lost_by_hand():
    def names_and_types(tools):
        texts = []
        for tool in tools:
            arguments = tool["function"]["parameters"]["properties"].items()
            texts += [f"{name}: {one.get('type')}{one.get('enum', '')}" for name, one in arguments]
        return "\n".join(texts)

    lost = lost_parts(names_and_types)
    assert "argument.enum" not in lost
    assert lost >= {"function.description", "field.enum", "argument.default", "parameters.required"}
    assert lost_parts(repr) == lost_parts(lambda tools: "") == frozenset()
    assert parts_of([DEFINED]) >= {"parameters.$defs", "argument.$ref", "argument.enum"}
    nested = {"type": "array", "items": {"anyOf": [{"const": 3}]}}
    assert parts_of([{"name": "f", "parameters": {"properties": {"x": nested}}}]) >= {
        "argument.items",
        "field.anyOf",
        "field.const",
    }
