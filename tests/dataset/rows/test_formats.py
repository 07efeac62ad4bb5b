"""Every row format of every type and the exact messages it becomes; what rows of no format, or of
another, say."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.format_keys import may_match
from coati.dataset.rows.formats import DATASET_FORMATS, FORMATS, FORMATS_OF, read_row
from coati.dataset.rows.row_errors import RowError
from coati.rewards.code_tests import read_tests
from tests.dataset.rows.test_format_files import in_files


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def spelled(
    messages, role: str = "role", content: str = "content", **names: str
) -> list[dict[str, str]]:
    return [{role: names.get(m["role"], m["role"]), content: m["content"]} for m in messages]


SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = turns("q1", "a1", "q2", "a2")
PARTS = [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]
# format, row, messages
SFT = [
    ("messages", {"messages": spelled(CHAT, "from", user="human")}, CHAT),
    ("messages", {"messages": spelled([SYSTEM, *CHAT], "from", user="User")}, [SYSTEM, *CHAT]),
    ("messages", {"messages": spelled([*CHAT, *turns("left out")], "from"), "id": 3}, CHAT),
    ("openai", {"messages": [SYSTEM, *CHAT]}, [SYSTEM, *CHAT]),
    ("openai", {"messages": [{"role": "user", "content": PARTS}, *CHAT[1:]]}, CHAT),
    ("openai", {"prompt": "q1", "messages": CHAT, "chosen": CHAT, "rejected": CHAT}, CHAT),
    ("message_list", CHAT, CHAT),
    (
        "sharegpt",
        {
            "conversations": spelled(CHAT, "from", "value", user="human", assistant="gpt"),
            "id": "x_0",
        },
        CHAT,
    ),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, turns("Add.\n\n1, 2", "3")),
    ("alpaca", {"instruction": "Add.", "input": "", "output": "3", "id": 7}, turns("Add.", "3")),
    (
        "alpaca",
        {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]], "system": "Be brief."},
        [SYSTEM, *CHAT],
    ),
    (
        "sharegpt",
        {"conversations": spelled(CHAT, "from", "value"), "system": "Be brief."},
        [SYSTEM, *CHAT],
    ),
    ("openai", {"messages": [SYSTEM, *CHAT], "system": "not this"}, [SYSTEM, *CHAT]),
    ("trl", {"prompt": "q", "completion": "a"}, turns("q", "a")),
    ("trl", {"prompt": CHAT[:3], "completion": CHAT[3:]}, CHAT),
]
PROMPT = [
    ("messages", {"messages": spelled(CHAT[:3], "from", user="human")}, CHAT[:3]),
    ("messages", {"messages": spelled(CHAT, "from", user="human")}, CHAT[:3]),
    ("openai", {"messages": [SYSTEM, *CHAT[:1]]}, [SYSTEM, *CHAT[:1]]),
    ("openai", {"messages": turns("q", " ")}, turns("q")),
    ("message_list", CHAT, CHAT[:3]),
    ("sharegpt", {"conversations": spelled(CHAT[:1], "from", "value", user="human")}, CHAT[:1]),
    ("alpaca", {"instruction": "q", "id": 1}, turns("q")),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, turns("q\n\nx")),
    ("rl_example", {"messages": {"role": "user", "content": "q"}, "gt_answer": "3"}, turns("q")),
    ("plain", "What is RLHF?", turns("What is RLHF?")),
    ("plain", {"prompt": "q"}, turns("q")),
    ("plain", {"question": "q", "id": "1"}, turns("q")),
    (
        "plain",
        {"prompt": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"},
        turns("q1", "a1", "q2"),
    ),
    ("trl", {"prompt": CHAT[:3]}, CHAT[:3]),
    ("preference", {"context": CHAT[:3], "chosen": CHAT[3:], "rejected": CHAT[1:2]}, CHAT[:3]),
    ("kto", {"prompt": CHAT[:3], "completion": CHAT[3], "label": False}, CHAT[:3]),
    (
        "hh_rlhf",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        turns("q"),
    ),
]
ASKED = spelled(CHAT[:3], "from", user="human")
HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
WELL = turns("a2", first="assistant")
BADLY = turns("no", first="assistant")
# format, row, context, chosen, rejected
PREFERENCE = [
    (
        "preference",
        {"context": ASKED, "chosen": spelled(WELL, "from"), "rejected": spelled(BADLY, "from")},
        CHAT[:3],
        WELL,
        BADLY,
    ),
    (
        "preference",
        {"context": [SYSTEM, *CHAT[:1]], "chosen": CHAT[1:], "rejected": BADLY},
        [SYSTEM, *CHAT[:1]],
        CHAT[1:],
        BADLY,
    ),
    ("hh_rlhf", {"chosen": f"{HH} a2", "rejected": f"{HH} no"}, CHAT[:3], WELL, BADLY),
    (
        "sharegpt",
        {
            "conversations": spelled(CHAT[:3], "from", "value", user="human", assistant="gpt"),
            "chosen": {"from": "gpt", "value": "a2"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        CHAT[:3],
        WELL,
        BADLY,
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "1", "chosen": "a2", "rejected": "no"},
        turns("q\n\n1"),
        WELL,
        BADLY,
    ),
    (
        "trl",
        {"system": "Be brief.", "question": "q1", "chosen": "a2", "rejected": "no"},
        [SYSTEM, CHAT[0]],
        WELL,
        BADLY,
    ),
    ("trl", {"prompt": HH, "chosen": f"{HH} a2", "rejected": f"{HH} no"}, CHAT[:3], WELL, BADLY),
    (
        "hh_rlhf",  # what differs begins with a turn of the assistant
        {
            "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: more\n\nAssistant: a2",
            "rejected": f"{HH} no",
        },
        CHAT[:1],
        turns("a1", "more", "a2", first="assistant"),
        turns("a1", "q2", "no", first="assistant"),
    ),
    (
        "rm_static",
        {"prompt": HH, "response": " a2", "chosen": " a2", "rejected": " no"},
        CHAT[:3],
        WELL,
        BADLY,
    ),
    ("trl", {"prompt": "q1", "chosen": "a2", "rejected": "no"}, CHAT[:1], WELL, BADLY),
    ("trl", {"prompt": CHAT[:3], "chosen": WELL, "rejected": BADLY}, CHAT[:3], WELL, BADLY),
    ("trl", {"chosen": CHAT, "rejected": [*CHAT[:3], *BADLY]}, CHAT[:3], WELL, BADLY),
    (
        "trl",
        {"prompt": "q1", "chosen": CHAT, "rejected": [*CHAT[:3], *BADLY]},
        CHAT[:3],
        WELL,
        BADLY,
    ),
    (
        "trl",
        {"chosen": [SYSTEM, *CHAT], "rejected": [SYSTEM, CHAT[0], *BADLY]},
        [SYSTEM, CHAT[0]],
        CHAT[1:],
        BADLY,
    ),
]
# format, row, prompt, completion, label
KTO = [
    (
        "kto",
        {"prompt": ASKED, "completion": {"from": "assistant", "content": "a"}, "label": True},
        CHAT[:3],
        "a",
        True,
    ),
    ("trl", {"prompt": "q1", "completion": "a", "label": False}, CHAT[:1], "a", False),
    ("trl", {"prompt": CHAT[:3], "completion": CHAT[3:], "label": True}, CHAT[:3], "a2", True),
    ("trl", {"prompt": "q1", "completion": "a", "label": "False"}, CHAT[:1], "a", False),
    ("trl", {"prompt": HH, "completion": " a", "label": 1}, CHAT[:3], "a", True),
]


@pytest.mark.parametrize(
    ("type", "case"), [("sft", case) for case in SFT] + [("prompt", case) for case in PROMPT]
)
def test_conversations_and_prompts(type, case):
    format, row, messages = case
    before = copy.deepcopy(row)
    for found in (read_row(type, row), read_row(type, row, format)):
        assert (found.messages, found.format, found.text) == (messages, format, None)
        assert found.label is found.completion is None and found.chosen == found.rejected == []
    assert row == before


@pytest.mark.parametrize(("format", "row", "context", "chosen", "rejected"), PREFERENCE)
def test_preferences(format, row, context, chosen, rejected):
    before = copy.deepcopy(row)
    for found in (read_row("preference", row), read_row("preference", row, format)):
        assert (found.messages, found.chosen, found.rejected, found.format) == (
            context,
            chosen,
            rejected,
            format,
        )
    assert row == before


@pytest.mark.parametrize(("format", "row", "prompt", "completion", "label"), KTO)
def test_judged_answers(format, row, prompt, completion, label):
    before = copy.deepcopy(row)
    for found in (read_row("kto", row), read_row("kto", row, format)):
        assert (found.messages, found.completion, found.label, found.format) == (
            prompt,
            completion,
            label,
            format,
        )
    assert row == before


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"source": "", "Target": "Games:\n1) Go"}, "Games:\n1) Go"),
        ({"source": "List games.", "Target": "Go"}, "List games.\nGo"),
        ({"source": None, "target": "Go"}, "Go"),
        ({"text": "Rivers run to the sea."}, "Rivers run to the sea."),
    ],
)
def test_plain_text(row, text):
    format = "text" if "text" in row else "source_target"
    for type in ("sft", "text"):
        found = read_row(type, row)
        assert (found.text, found.messages, found.format) == (text, [], format)


def test_every_format_is_shown_above():
    seen = {
        (t, c[0])
        for t, cases in (("sft", SFT), ("prompt", PROMPT), ("preference", PREFERENCE), ("kto", KTO))
        for c in cases
    }
    seen |= {(type, name) for type in ("sft", "text") for name in ("source_target", "text")}
    seen.add(("text", "document"))  # tests/dataset/types/test_text_rows.py
    # tests/dataset/types/test_scored_rows.py: what preference, kto and sft read, with a score.
    read = {"pair", "judged", "conversation", "scored"}
    seen |= {("scored", format.name) for format in DATASET_FORMATS if format.holds in read}
    seen |= in_files() | {("prompt", name) for name in ("rm_static", "ms_swift")}
    every = {(type, format.name) for format in DATASET_FORMATS for type in format.types}
    assert every - seen == set() and seen <= every
    assert set(FORMATS) == {name for names in FORMATS_OF.values() for name in names}


def test_further_columns_are_kept():
    row = read_row(
        "prompt", {"messages": spelled(CHAT, "from"), "gt_answer": 7, "category": "sums"}
    )
    assert (row.gt_answer, row.category) == ("7", "sums")
    cases = {"inputs": ["1"], "outputs": ["2"]}
    row = read_row("prompt", {"messages": {"role": "user", "content": "q"}, "test_cases": cases})
    assert json.loads(row.gt_answer) == cases
    for whole in (["assert f(1) == 2"], cases):  # tests, as python_tests takes them
        assert (
            json.loads(read_row("prompt", {"prompt": "q", "gt_answer": whole}).gt_answer) == whole
        )
    row = read_row("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "0.5"})
    assert row.margin == 0.5 and row.category is None and row.weight is None
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for value, weight in ((2, 2.0), ("0.5", 0.5), (0, 0.0), (None, None), ("", None)):
        row = read_row("preference", pair | {"weight": value})
        assert row.weight == weight and not row.unused
    assert read_row("prompt", {"prompt": "q", "weight": 2}).weight is None
    assert read_row("prompt", {"prompt": "q", "gt_answer": ""}).gt_answer is None


@pytest.mark.parametrize(
    ("columns", "truth"),
    [
        ({"test_list": ["assert f(1) == 2"]}, {"test_list": ["assert f(1) == 2"]}),
        (
            {"test_list": ["assert h == 2"], "test_setup_code": "h = f(1)", "test_imports": []},
            {"test_list": ["assert h == 2"], "test_setup_code": "h = f(1)"},
        ),
        (
            {"input_output": '{"inputs": ["1"], "outputs": ["2"]}'},
            {"inputs": ["1"], "outputs": ["2"]},
        ),
        (
            {"input_output": {"inputs": ["1"], "outputs": ["2"]}},
            {"input_output": {"inputs": ["1"], "outputs": ["2"]}},
        ),
        (
            {"test": "def check(c): assert c(1) == 2", "entry_point": "f"},
            {"test": "def check(c): assert c(1) == 2", "entry_point": "f"},
        ),
    ],
)
def test_tests_of_a_program_are_its_truth(columns, truth):
    """MBPP's, APPS' and HumanEval's columns, before a whole solution."""
    row = read_row("prompt", {"prompt": "q", "solution": "def f(n): ...", **columns})
    assert json.loads(row.gt_answer) == truth and read_tests(row.gt_answer)
    assert not set(columns) & set(row.unused) - {"test_imports"}
    assert read_row("prompt", {"prompt": "q", "test": "x", "answer": "7"}).gt_answer == "7"
    given = {"prompt": "q", "gt_answer": "7", **columns}
    assert read_row("prompt", given).gt_answer == "7"


PAIR = {"context": CHAT[:1], "chosen": WELL, "rejected": BADLY}
JUDGED = {"prompt": "q", "completion": "a", "label": True}
TOOL = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("type", "row", "reason", "said"),
    [
        (
            "sft",
            PAIR,
            "wrong_type",
            "rejected: preference rows, for --type preference or prompt, not sft",
        ),
        (
            "sft",
            {"conversations": CHAT, **PAIR, "context": None},
            "wrong_type",
            "sharegpt rows, for --type preference",
        ),
        ("sft", JUDGED, "wrong_type", "trl rows, for --type kto or prompt, not sft"),
        ("sft", {"instruction": "q"}, "wrong_type", "for which they need instruction, output"),
        ("sft", "a line", "wrong_type", "found a text: plain rows, for --type prompt, not sft"),
        ("kto", PAIR, "wrong_type", "for --type preference or prompt, not kto"),
        (
            "preference",
            {"messages": CHAT},
            "wrong_type",
            "openai rows, for --type sft or prompt, not preference",
        ),
        ("preference", JUDGED, "wrong_type", "for --type kto or prompt, not preference"),
        (
            "prompt",
            {"source": "s", "Target": "t"},
            "wrong_type",
            "source_target rows, for --type sft or text, not prompt",
        ),
        (
            "sft",
            {"mesages": CHAT},
            "wrong_keys",
            "nearest is openai (messages) of --type sft or prompt, which",
        ),
        (
            "sft",
            {"instuction": "q", "output": "a"},
            "wrong_keys",
            "nearest is alpaca (instruction, output)",
        ),
        ("preference", {"context": CHAT[:1], "chosen": WELL}, "wrong_keys", "which needs rejected"),
        ("kto", {"a": 1}, "wrong_keys", "expected prompt, completion, label / messages, label"),
        ("sft", {"messages": None}, "wrong_keys", "found messages (null)"),
        ("sft", 7, "wrong_keys", "found int"),
        ("sft", [1], "wrong_keys", "found list"),
        (
            "sft",
            {"messages": [CHAT[0], TOOL]},
            "roles_not_alternating",
            "message 1 is from tool, expected assistant: no call",
        ),
        (
            "sft",
            {"messages": [*CHAT, {"role": "developer", "content": "x"}]},
            "roles_not_alternating",
            "message 4 is from system, expected user",
        ),
        (
            "sft",
            {"conversations": [{"from": "function_call", "value": "x"}]},
            "bad_tool_call",
            "message 0 holds 'x', expected JSON of a call",
        ),
        (
            "sft",
            {
                "messages": [
                    CHAT[0],
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                ]
            },
            "bad_tool_call",
            "message 1 calls a function without a name",
        ),
        ("sft", {"messages": [{"role": "bing", "content": "x"}]}, "unknown_role", "'bing'"),
        (
            "sft",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "content_not_text",
            "message 0 holds a list with image_url in it",
        ),
        (
            "sft",
            {"instruction": "q", "output": "a", "history": ["q1"]},
            "wrong_keys",
            "history must be a list of",
        ),
        ("sft", {"messages": CHAT, "system": 7}, "content_not_text", "system holds int"),
        ("sft", {"source": " ", "Target": ""}, "empty_conversation", "no text"),
        ("prompt", {"messages": []}, "empty_conversation", "empty"),
        ("prompt", {"messages": [SYSTEM]}, "no_question", "found system"),
        (
            "prompt",
            {"messages": turns("a", first="assistant")},
            "roles_not_alternating",
            "expected user",
        ),
        ("prompt", {"prompt": 7}, "wrong_keys", "prompt must be a list of messages, found int"),
        ("preference", {**PAIR, "context": []}, "empty_conversation", "empty"),
        ("preference", {**PAIR, "context": CHAT[:2]}, "no_question", "found user, assistant"),
        ("preference", {**PAIR, "chosen": []}, "empty_answer", "chosen is empty"),
        (
            "preference",
            {**PAIR, "rejected": turns(" ", first="assistant")},
            "empty_answer",
            "rejected: message 0",
        ),
        (
            "preference",
            {**PAIR, "rejected": turns("q")},
            "roles_not_alternating",
            "rejected: message 0 is from user",
        ),
        ("preference", {**PAIR, "rejected": WELL}, "same_answers", "'a2'"),
        ("preference", {**PAIR, "margin": "much"}, "bad_margin", "'much'"),
        (
            "preference",
            {"chosen": "Hello", "rejected": "Go away"},
            "wrong_keys",
            "chosen is a text without its prompt",
        ),
        (
            "preference",
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
            "no_question",
            "in common",
        ),
        ("preference", {**PAIR, "margin": "wide"}, "bad_margin", "'wide'"),
        ("preference", {**PAIR, "margin": float("nan")}, "bad_margin", "nan"),
        ("prompt", {"prompt": " "}, "no_question", "message 0, the last of the user, is blank"),
        (
            "prompt",
            {"prompt": "q", "gt_answer": [b"7"]},
            "bad_gt_answer",
            "bytes is not JSON serializable",
        ),
        (
            "prompt",
            {"prompt": "q", "test_cases": [b"7"]},
            "bad_gt_answer",
            "bytes is not JSON serializable",
        ),
        ("kto", {**JUDGED, "label": "maybe"}, "bad_label", "'maybe'"),
        ("kto", {**JUDGED, "label": 2}, "bad_label", "2"),
        ("kto", {**JUDGED, "label": 0.5}, "bad_label", "0.5"),
        ("kto", {**JUDGED, "completion": " "}, "empty_answer", "completion is empty"),
        (
            "kto",
            {**JUDGED, "completion": CHAT},
            "roles_not_alternating",
            "one message of the assistant, found user, a",
        ),
        (
            "kto",
            {**JUDGED, "prompt": CHAT},
            "no_question",
            "found user, assistant, user, assistant",
        ),
    ],
)
def test_what_unusable_rows_say(type, row, reason, said):
    with pytest.raises(RowError) as error:
        read_row(type, row)
    assert error.value.reason == reason and said in error.value.detail


def test_a_forced_format_reads_no_other():
    with pytest.raises(RowError) as error:
        read_row("sft", {"messages": CHAT}, "alpaca")
    assert error.value.reason == "wrong_keys"
    assert "expected instruction, output (--format alpaca), found messages" in error.value.detail
    row = {"messages": CHAT, "instruction": "q", "output": "a"}
    assert read_row("sft", row).format == "openai"
    assert read_row("sft", row, "alpaca").messages == turns("q", "a")


KEYS = (
    "messages conversations context chosen rejected prompt completion label instruction output "
    "history source Target response question system margin gt_answer role from content value type "
    "text"
).split()
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", "user", "gpt", "tool", "\n\nHuman: q", "x"])
)
ROWS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(row=ROWS | st.dictionaries(st.sampled_from(KEYS), ROWS, min_size=1, max_size=6))
def test_whatever_a_row_is_it_is_read_or_named(row):
    before = copy.deepcopy(row)
    for type in DATA_TYPES:
        try:
            assert read_row(type, row).format in FORMATS_OF[type]
        except RowError as error:
            assert error.detail
    assert row == before


_COLUMNS = {
    "messages": [CHAT, spelled(CHAT, "from", "value"), {"role": "user", "content": "q"}],
    "conversations": [CHAT, [{"human": "q", "assistant": "a"}]],
    "conversation": [CHAT, [{"input": "q", "output": "a"}]],
    "context": ["c", CHAT[:1]],
    "prompt": ["q", CHAT[:1], {"text": "q", "replies": [{"text": "a", "role": "assistant"}]}],
    "completion": ["a", CHAT[1]],
    "chosen": ["a", CHAT],
    "rejected": ["b", CHAT],
    "responses": [["a", "b"]],
    "scores": [[1, 2]],
    "label": [True, "topic", "good"],
    "kto_tag": [False],
    "answers": ["[]", ["a"]],
    "chat": ["USER: q\nASSISTANT: a"],
    **{
        name: ["t"]
        for name in ("question", "instruction", "input", "output", "response", "answer", "solution")
    },
    **{name: ["t"] for name in ("text", "content", "raw_content", "target", "Source", "history")},
}


@settings(deadline=None, max_examples=400)
@given(
    st.fixed_dictionaries(
        {}, optional={k: st.sampled_from([*v, None]) for k, v in _COLUMNS.items()}
    )
)
def test_no_format_that_a_row_has_is_left_out_by_the_names_of_its_columns(row):
    for format in DATASET_FORMATS:
        assert not format.matches(row) or may_match(format.matches, tuple(row)), format


@pytest.mark.parametrize(
    "says", ["apples, plums", '"Yes", he said', " no ", "\tx", "[1] (2)", "{x"]
)
@pytest.mark.parametrize("extra", [{}, {"id": 7}])  # with more than role and content: read closely
def test_texts_that_begin_as_messages_may(says, extra):
    found = read_row("sft", {"messages": [{**one, **extra} for one in turns(says, says)]})
    assert found.messages == turns(says, says)
    assert found.unused == ({"messages[].id": False} if extra else {})
