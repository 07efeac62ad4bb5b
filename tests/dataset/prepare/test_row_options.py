"""What is learned of a row, as settings of a preparation: kept with the rows, part of what they are
known by, counted and warned of in the report."""

import json

import pytest

from coati.dataset import load_tokenized_dataset, prepare_dataset, setup_conversation_template
from coati.dataset.chat.row_options import RowOptions
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.fingerprint import describe
from coati.dataset.load.loader import preparation_of
from coati.dataset.prepare import write_pass
from coati.dataset.rows.source_row import SourceRow
from coati.inference.model_loading import conversation_of
from coati.utils.json_io import load_json
from tests.dataset.chat.family_templates import WEATHER, answer, call, family, result, user
from tests.dataset.chat.test_masks import R1_LIKE
from tests.dataset.makers import chatml_tokenizer

THINKING = [
    {"messages": [user("3*4?"), answer("12", f"Three fours, {n} times.")]} for n in range(3)
]
PLAIN = [{"messages": [user(f"{n}?"), answer(f"{n}!")]} for n in range(4)]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares rows that are SourceRows already, whatever reads files."""

    def read(type: str, row: dict, *_: object) -> SourceRow:
        return SourceRow(**row, format="made")

    monkeypatch.setattr(write_pass, "read_row", read)

    def prepared(template, rows, name="out", type="sft", bins=1):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_dataset(
            inputs=[source],
            tokenizer=template.tokenizer,
            template=template,
            arrow_dir=tmp_path / name,
            type=type,
            num_bins=bins,
            num_proc=1,
            show=None,
        )

    prepared.folder = tmp_path
    return prepared


def strips(**options):
    return setup_conversation_template(chatml_tokenizer(R1_LIKE), {}, options=RowOptions(**options))


def warned(report, text: str) -> bool:
    return any(text in warning for warning in report["warnings"])


def test_dropped_thoughts_are_counted_and_warned_of(prepare):
    report = prepare(strips(), THINKING + PLAIN)
    assert report["traits"]["thoughts dropped by the template"] == 3
    assert warned(
        report, "drops the thoughts of 3 rows, which are trained without them: --thoughts"
    )
    report = prepare(strips(thoughts="keep"), THINKING + PLAIN, "kept")
    assert report["traits"]["thoughts added to the template's text"] == 3
    assert not warned(report, "thought") and report["template"]["options"] == {"thoughts": "keep"}
    rows = load_tokenized_dataset(str(prepare.folder / "kept")).to_list()
    assert rows[1]["labels_decode"] == ["Three fours, 1 times.\n</think>\n\n12<|im_end|>"]
    report = prepare(strips(thoughts="refuse"), THINKING + PLAIN, "refused")
    assert report["dropped"]["thought_dropped"]["rows"] == 3 and report["rows_kept"] == 4


def test_empty_thoughts_are_named(prepare):
    report = prepare(family("qwen3"), PLAIN)
    said = "an empty thought before responses of 4 rows that have none: it is masked (--empty_th"
    assert report["traits"]["empty thoughts of the template"] == 4 and warned(report, said)
    report = prepare(family("qwen3", empty_thoughts="supervise"), PLAIN, "learned")
    assert warned(report, "it is learned (--empty_thoughts mask changes that)")


def test_rows_with_tools_need_a_template_that_writes_them(prepare):
    rows = [
        {"messages": [user("Warm?"), call({"city": "Oslo"}), result("4 C"), answer("No.")]},
        {"messages": [user("Hi"), answer("Ho")], "tools": [WEATHER]},
        *PLAIN,
    ]
    report = prepare(family("phi_3"), rows)
    assert report["dropped"]["tools_unsupported"]["rows"] == 2 and report["rows_kept"] == 4
    assert warned(report, "2 rows need a chat template that writes tools")
    report = prepare(family("qwen3"), rows, "whole")
    assert report["rows_kept"] == 6 and "tools_unsupported" not in report["dropped"]


def test_pairs_that_become_equal_are_dropped_and_counted(prepare):
    pair = {"chosen": [answer("12", "Right.")], "rejected": [answer("12", "Wrong.")]}
    rows = [{"messages": [user("3*4?")], **pair} for _ in range(3)]
    rows.append({"messages": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]})
    report = prepare(strips(), rows, type="preference")
    assert report["dropped"]["same_rendering"]["rows"] == 3 and report["rows_kept"] == 1
    report = prepare(strips(thoughts="keep"), rows, "kept", type="preference")
    assert report["rows_kept"] == 4


def test_weights_that_pairs_do_not_have_are_named(prepare):
    pair = {"chosen": [answer("b", weight=0.5)], "rejected": [answer("c")]}
    report = prepare(family("qwen2_5"), [{"messages": [user("a")], **pair}], type="preference")
    assert warned(report, "1 rows give weights to turns, which rows of type preference do not have")


@pytest.mark.parametrize("bins", [1, 3])
def test_weights_become_a_column_of_all_shards_where_a_row_needs_it(prepare, bins):
    weighted = {"messages": [user("a"), answer("b", weight=0.5)]}
    prepare(family("qwen2_5"), [*PLAIN, weighted, *PLAIN], "weighted", bins=bins)
    prepare(family("qwen2_5"), PLAIN, "plain", bins=bins)
    found = load_tokenized_dataset(str(prepare.folder / "weighted"))
    plain = load_tokenized_dataset(str(prepare.folder / "plain"))
    assert set(found.column_names) == {*plain.column_names, "loss_weights"}
    assert [0.5 in row for row in found["loss_weights"]] == [False] * 4 + [True] + [False] * 4
    masked = {"messages": [user("a"), answer("b", weight=0), user("c"), answer("d")]}
    prepare(family("qwen2_5"), [*PLAIN, masked], "masked")
    assert "loss_weights" not in load_tokenized_dataset(str(prepare.folder / "masked")).column_names


def test_other_options_are_another_preparation(prepare):
    prepare(strips(), PLAIN)
    with pytest.raises(ValueError, match="made from something else: thoughts was None, now 'keep'"):
        prepare(strips(thoughts="keep"), PLAIN)
    prepare(family("qwen3"), PLAIN, "args")
    args = {"enable_thinking": False}
    with pytest.raises(ValueError, match="the conversation template differs in template_args"):
        prepare(family("qwen3", args), PLAIN, "args")


def test_what_is_default_is_no_part_of_what_rows_are_known_by():
    files = {"inputs": []}

    def extra(template) -> set[str]:
        known = {"layout", "tokenizer", "template", "inputs"}
        found = describe(files, template, Cleaning())
        return {name for name in found if not name.startswith("cleaning ")} - known

    assert extra(strips()) == set()
    assert extra(strips(thoughts="keep", learn="last_turn")) == {"thoughts", "learn"}
    # Where the template's own text holds an empty thought, its mask decides.
    assert extra(family("qwen3")) == {"empty_thoughts"}


def test_arguments_are_kept_with_the_rows_and_used_where_a_model_responds(prepare):
    args = {"enable_thinking": False}
    template = family("qwen3", args)
    prepare(template, PLAIN)
    folder = prepare.folder / "out"
    stored = load_json(folder / "conversation_template.json")
    assert stored["template_args"] == args
    assert preparation_of(str(folder))["conversation_template"]["template_args"] == args
    found = conversation_of(folder, template.tokenizer)  # as of a model's directory
    text = found.encode_prompt([user("Hi")]).text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
