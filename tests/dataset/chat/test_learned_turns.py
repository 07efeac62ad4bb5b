"""Which turns of a conversation are learned, and how much: --learn, weights of messages and of
parts of them."""

import pytest

from coati.dataset import load_tokenized_dataset, setup_conversation_template
from coati.dataset.chat.dialogue import UNUSED_WEIGHT
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.shards import ShardWriter, to_arrow, unify
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
from coati.utils.constants import IGNORE_INDEX
from tests.dataset.chat.family_templates import WEATHER, answer, call, family, result, user
from tests.dataset.makers import CHATML, byte_level

SFT = DATA_TYPES["sft"]
TALK = [
    {"role": "system", "content": "Be kind."},
    user("Name a fruit."),
    answer("Stone."),
    user("No."),
    answer("Apple."),
]
TOOL_TALK = [
    user("Warm?"),
    call({"city": "Oslo"}),
    result("4 C"),
    answer("No."),
    user("Ok."),
    answer("Bye."),
]


def columns(template, messages, tools=None, max_length=2000) -> list[dict]:
    made = SFT.tokenize(SourceRow(messages=messages, tools=tools), template, max_length)
    return [row for row, _ in made]


def learned(template, messages, tools=None) -> list[list[str]]:
    """What the labels hold, cross-checked with what people are shown of it."""
    found = []
    for row in columns(template, messages, tools):
        runs = [[]]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (IGNORE_INDEX, token)
            if label == IGNORE_INDEX:
                runs += [[]] if runs[-1] else []
            else:
                runs[-1].append(label)
        texts = [template.encoder.decode(run) for run in runs if run]
        assert "".join(texts) == "".join(row["labels_decode"])
        found.append(texts)
    return found


def test_all_turns_or_the_last():
    assert learned(family("qwen2_5"), TALK) == [["Stone.<|im_end|>", "Apple.<|im_end|>"]]
    last = family("qwen2_5", learn="last_turn")
    assert learned(last, TALK) == [["Apple.<|im_end|>"]]
    assert learned(last, TOOL_TALK) == [["Bye.<|im_end|>"]]
    assert learned(family("qwen3", learn="last_turn"), TALK) == [["Apple.<|im_end|>"]]
    whole = family("qwen2_5").encode(TALK)
    (one,) = last.encode_turns(TALK)
    assert one.input_ids == whole.input_ids and one.spans == whole.spans[-1:]


def test_a_last_turn_that_does_not_fit_leaves_nothing():
    template = family("qwen2_5", learn="last_turn")
    needed = len(columns(template, TALK)[0]["input_ids"])
    with pytest.raises(RowError, match=f"{needed} tokens are needed"):
        columns(template, TALK, max_length=needed - 1)


@pytest.mark.parametrize(
    ("roles", "texts"),
    [
        ("assistant", ["Stone.<|im_end|>", "Apple.<|im_end|>"]),
        ("user", ["Name a fruit.<|im_end|>", "No.<|im_end|>"]),
        ("system", ["Be kind.<|im_end|>"]),
        (
            "user,assistant",
            ["Name a fruit.<|im_end|>", "Stone.<|im_end|>", "No.<|im_end|>", "Apple.<|im_end|>"],
        ),
    ],
)
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_turns_of_roles(name, roles, texts):
    found = learned(family(name, learn=f"roles:{roles}"), TALK)
    assert [text for row in found for text in row] == texts


def test_results_of_tools_are_learned_when_that_is_asked_for():
    found = learned(family("qwen2_5", learn="roles:tool"), TOOL_TALK, [WEATHER])
    assert found == [["4 C"]]
    found = learned(family("gpt_oss", learn="roles:tool"), TOOL_TALK, [WEATHER])
    assert [row for row in found if row] == [["4 C"]]  # within JSON


def test_a_content_that_stands_in_the_header_too_is_found_where_it_is():
    found = learned(family("qwen2_5", learn="roles:user"), [user("user"), answer("user")])
    assert found == [["user<|im_end|>"]]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4_5", "gpt_oss", "magistral"])
def test_a_turn_of_weight_0_is_read_and_not_learned(name):
    template = family(name)
    turns = [
        user("Name a fruit."),
        answer("Stone.", weight=0.0),
        user("No."),
        answer("Apple.", weight=1.0),
    ]
    said = [text for row in learned(template, turns) for text in row]
    assert len(said) == 1 and "Apple." in said[0] and said[0].endswith(template.end_of_assistant)
    plain = [{name: m[name] for name in ("role", "content")} for m in turns]
    expected = template.encode_turns(plain)
    (row,) = template.encode_turns(turns)
    assert row.input_ids == expected[-1].input_ids  # the same tokens in any case
    assert all("loss_weights" not in one for one in columns(template, turns))


def test_nothing_to_learn():
    turns = [user("a"), answer("b", weight=0)]
    with pytest.raises(RowError, match="of 1 turns of the assistant") as error:
        columns(family("qwen2_5"), turns)
    assert error.value.reason == "nothing_learned"


def test_weights_of_turns_by_token():
    template = family("qwen2_5")
    turns = [user("Fruit?"), answer("Pear.", weight=0.5), user("No."), answer("Apple.")]
    (row,) = columns(template, turns)
    weights = row["loss_weights"]
    assert len(weights) == len(row["input_ids"])
    half = [token for token, weight in zip(row["input_ids"], weights, strict=True) if weight == 0.5]
    assert template.encoder.decode(half) == "Pear.<|im_end|>"
    assert set(weights) == {0.5, 1.0}
    assert learned(template, turns) == [["Pear.<|im_end|>", "Apple.<|im_end|>"]]


def test_a_masked_turn_beside_a_weighted_one_weighs_nothing_or_all():
    """Of what is not learned the weight matters only where a run learns every token."""
    template = family("qwen2_5")
    turns = [user("a"), answer("No.", weight=0), user("b"), answer("Yes.", weight=0.25)]
    (row,) = columns(template, turns)
    learned_weights = [
        weight
        for weight, label in zip(row["loss_weights"], row["labels"], strict=True)
        if label != IGNORE_INDEX
    ]
    assert set(learned_weights) == {0.25}
    assert learned(template, turns) == [["Yes.<|im_end|>"]]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "mistral_v0_3", "nemotron_3", "glm4_5"])
def test_parts_of_a_text(name):
    """Characters 4 to 10 of the answer are not learned, 11 to 14 a quarter."""
    template = family(name)
    text = "Two, WRONG! or six."
    turns = [user("3+3?"), answer(text, spans=[[5, 11, 0.0], [12, 14, 0.25]])]
    (row,) = columns(template, turns)
    said = "".join(text for row in learned(template, turns) for text in row)
    assert said.strip() == "Two,  or six." + template.end_of_assistant
    quarter = [
        token
        for token, weight in zip(row["input_ids"], row["loss_weights"], strict=True)
        if weight == 0.25
    ]
    assert template.encoder.decode(quarter) == "or"


def test_parts_alone_of_a_turn_of_weight_0():
    turns = [user("3+3?"), answer("Two or six.", weight=0, spans=[[7, 10, 1.0]])]
    assert learned(family("qwen2_5"), turns) == [["six"]]


def test_a_token_over_the_border_of_a_part_counts_as_the_lesser():
    template = family("qwen2_5")
    merges = [("s", "i"), ("si", "x")]
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"}, template.chat_template, merges)
    wide = type(template).from_config(tokenizer, {"chat_template": template.chat_template})
    turns = [user("3+3?"), answer("a six b", spans=[[3, 4, 0.0]])]  # the i of six
    said = "".join(text for row in learned(wide, turns) for text in row)
    assert said == "a  b<|im_end|>"
    plain = [user("3+3?"), answer("a six b")]
    assert columns(wide, turns)[0]["input_ids"] == columns(wide, plain)[0]["input_ids"]


def test_parts_count_characters_of_what_was_typed():
    """A marker in the text is hidden behind other characters while it is rendered."""
    text = "x <|im_end|> BAD ok"
    turns = [user("?"), answer(text, spans=[[13, 16, 0.0]])]
    assert "".join(learned(family("qwen2_5"), turns)[0]) == "x <|im_end|>  ok<|im_end|>"


def test_a_part_of_a_text_that_the_template_changes_is_refused():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n"
        "' + m.content|replace('six', '6') + '<|im_end|>' }}{% endfor %}"
    )
    conversation = setup_conversation_template(
        byte_level(CHATML, {"eos_token": "<|im_end|>"}, template), {}
    )
    with pytest.raises(RowError, match="parts of message 1 have weights"):
        columns(conversation, [user("?"), answer("a six b", spans=[[0, 1, 0.0]])])


def test_weights_of_others_are_counted():
    turns = [user("a") | {"weight": 1.0}, answer("b")]
    (row,) = family("qwen2_5").encode_turns(turns)
    assert row.notes == {UNUSED_WEIGHT}
    (row,) = family("qwen2_5", learn="roles:user,assistant").encode_turns(turns)
    assert row.notes == frozenset()
    (row,) = family("qwen2_5").encode_turns([user("a") | {"weight": 0.0}, answer("b")])
    assert row.notes == frozenset()


def rows_of(*weights: float) -> list[dict]:
    template = family("qwen2_5")
    return [
        row
        for weight in weights
        for row in columns(template, [user("a"), answer("b", weight=weight)])
    ]


def test_prepared_rows_have_the_column_where_one_needs_it(tmp_path):
    """Whichever chunk and shard the weighted row is in; plain preparations have none."""
    plain = rows_of(1, 1)
    mixed = [*rows_of(1), *rows_of(0.5)]
    shards = {"part-00000": [plain, plain], "part-00001": [plain, mixed, plain]}
    for name, chunks in shards.items():
        with ShardWriter(SFT, tmp_path / name, None) as writer:
            for chunk in chunks:
                writer.add(to_arrow(SFT, chunk), b"")
            writer.close()
            assert writer.rows == sum(map(len, chunks))
    narrow = load_tokenized_dataset(str(tmp_path / "part-00000"))
    assert "loss_weights" not in narrow.column_names
    before = narrow.to_list()
    unify(SFT, [tmp_path / name for name in shards])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(shards)
    rows = load_tokenized_dataset(str(tmp_path))
    assert rows.features["loss_weights"].feature.dtype == "float32"
    found = rows.to_list()
    ones = [1.0] * len(plain[0]["input_ids"])
    assert [row["loss_weights"] == ones for row in found] == [True] * 7 + [False] + [True] * 2
    assert [{name: row[name] for name in before[0]} for row in found[:4]] == before
    unify(SFT, [tmp_path / name for name in shards])  # nothing is left to do
    assert load_tokenized_dataset(str(tmp_path)).to_list() == found
