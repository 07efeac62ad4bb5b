"""score.py: scores of every kind of row, accuracy, histogram; what cannot be scored is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coati.cli.row_flags import template_args
from coati.cli.score import parse_score
from coati.dataset.rows.row_errors import RowError
from coati.inference.evaluate import score_rows as scoring
from coati.models import RewardModel
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]


def talk(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


PAIRS = [
    {
        "context": [talk("user", "hello")],
        "chosen": [talk("assistant", a)],
        "rejected": [talk("assistant", b)],
    }
    for a, b in (
        ("hi there", "no"),
        ("how are you today", "system"),
        ("a", "hello there, how are you?"),
    )
]
JUDGED = {
    "prompt": [talk("user", "hello")],
    "completion": talk("assistant", "hi there"),
    "label": True,
}
PLAIN = {"messages": [talk("user", "hello"), talk("assistant", "hi there")]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rm") / "modeling"
    torch.manual_seed(3)
    reward = RewardModel(backbone=tiny_llama())
    reward.config.save_pretrained(folder)
    save_file(
        {name: t.contiguous() for name, t in reward.state_dict().items()},
        folder / "model.safetensors",
    )
    tiny_tokenizer().save_pretrained(folder)
    return str(folder.parent)


def rows_file(tmp_path, rows) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def scored(model, tmp_path, rows, batch_size=16) -> list[scoring.ScoredRow]:
    reward, tokenizer, conversation = scoring.load_reward_model(model)
    found = list(scoring.rows_to_score([rows_file(tmp_path, rows)], conversation, 200))
    scoring.score(reward, found, tokenizer.pad_token_id, batch_size)
    return found


def test_a_row_has_one_score_whatever_kind_it_is_and_whoever_its_batch_mates_are(model, tmp_path):
    found = scored(model, tmp_path, [*PAIRS, JUDGED, PLAIN])
    first = found[0].scores[0]
    assert (
        found[3].scores[0]
        == pytest.approx(first, abs=1e-5)
        == pytest.approx(found[4].scores[0], abs=1e-5)
    )
    alone = scored(model, tmp_path, PAIRS, batch_size=1)
    assert [row.scores for row in alone] == [
        pytest.approx(row.scores, abs=1e-5) for row in found[:3]
    ]
    assert len({round(score, 4) for row in alone for score in row.scores}) == 6


def test_what_is_written_of_a_row():
    pair = scoring.ScoredRow("f:1", "preference", scores=[1.0, 2.0])
    assert pair.as_dict() == {"row": "f:1", "chosen": 1.0, "rejected": 2.0, "right": False}
    assert scoring.ScoredRow("f:2", "kto", True, scores=[0.5]).as_dict() == {
        "row": "f:2",
        "score": 0.5,
        "label": True,
    }
    assert scoring.ScoredRow("f:3", "sft", scores=[0.5]).as_dict() == {"row": "f:3", "score": 0.5}


def test_summary_by_hand():
    rows = [
        scoring.ScoredRow("", "preference", scores=s)
        for s in ([2.0, 1.0], [3.0, 0.0], [0.0, 0.0], [0.0, 1.0])
    ]
    lines = scoring.summary([*rows, scoring.ScoredRow("", "kto", False, scores=[-1.0])])
    assert lines[0].startswith("accuracy 0.6250 on 4 pairs")
    assert (
        "chosen: mean 1.2500" in lines[1]
        and "rejected: mean 0.5000" in lines[2]
        and "bad: mean -1.0000" in lines[3]
    )


def test_the_histogram_is_a_picture_of_the_counts(tmp_path):
    from PIL import Image

    groups = {"chosen": torch.tensor([1.0, 1.0, 1.0]), "rejected": torch.tensor([-1.0])}
    image = Image.open(scoring.write_histogram(groups, tmp_path / "h.png", bins=4))
    assert image.format == "PNG"
    image = image.convert("RGB")
    assert image.size == (960, 480)
    # The last bin is three high, the first one high: above a third of the height there is ink on
    # the right only.
    assert image.getpixel((900, 150)) != (255, 255, 255) and image.getpixel((120, 150)) == (
        255,
        255,
        255,
    )
    assert image.getpixel((120, 400)) != (255, 255, 255)
    scoring.write_histogram({"all": torch.tensor([0.5])}, tmp_path / "one.png")


def run_script(*words: str) -> subprocess.CompletedProcess:
    script = ROOT / "examples" / "inference" / "score.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=environment
    )


def test_the_script(model, tmp_path):
    rows = rows_file(tmp_path, [*PAIRS, {"messages": []}])
    done = run_script(
        "--model_path", model, "--input", rows, "--histogram", str(tmp_path / "h.png")
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["row"] for line in lines] == [f"{rows}:{number}" for number in (1, 2, 3)]
    assert f"{rows}:4 is left out (" in done.stderr and "on 3 pairs" in done.stderr
    assert (tmp_path / "h.png").exists()


def test_a_language_model_is_no_judge(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no scalar head"):
        scoring.load_reward_model(tmp_path)


def test_arguments_of_the_template_are_taken_and_checked(model):
    words = ["--model_path", str(model), "--input", "x", "--template_args", '{"tone": 1}']
    args = template_args(parse_score(words).template_args)
    with pytest.raises(ValueError, match="^--template_args the chat template reads no 'tone'"):
        scoring.load_reward_model(model, template_args=args)
    own = {"chat_template": "{{ tone }}" + CHATML}
    assert scoring.load_reward_model(model, own, template_args=args)[2].render([]) == "1"


TREE = {
    "prompt": {
        "role": "prompter",
        "text": "hello",
        "replies": [
            {"role": "assistant", "text": text, "rank": rank, "replies": []}
            for rank, text in enumerate(("hi there", "no"))
        ],
    }
}


def one_kind(model, row) -> list[list[list[int]]]:
    _, _, conversation = scoring.load_reward_model(model)
    return scoring.row_to_score("row", row, conversation, 200).ids


def test_every_conversation_of_a_tree_is_scored(model, tmp_path):
    talks = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]
    sides = [{"messages": [talks[0], talks[1] | {"content": text}]} for text in ("hi there", "no")]
    found = scored(model, tmp_path, [TREE, *sides])
    assert [row.place.rpartition(":")[2] for row in found] == ["1", "1", "2", "3"]
    assert [row.ids for row in found[:2]] == [row.ids for row in found[2:]]
    assert found[0].scores == pytest.approx(found[2].scores, abs=1e-5)
    with pytest.raises(RowError, match="holds 2 sft rows, expected one"):
        one_kind(model, TREE)


def test_columns_as_a_list_of_data_sets_names_them(model, tmp_path):
    odd = {"ask": "hello", "good": "hi there", "bad": "no"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    entry = {"file_name": "odd.jsonl", "ranking": True, "columns": columns}
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"odd": entry}))
    _, _, conversation = scoring.load_reward_model(model)
    (found,) = scoring.rows_to_score([str(info)], conversation, 200)
    known = {"prompt": "hello", "chosen": "hi there", "rejected": "no"}
    assert found.kind == "preference" and found.ids == one_kind(model, known)
    # Other spellings of the columns are a pair, too.
    assert one_kind(model, {"Prompt": "hello", "Chosen": "hi there", "Rejected": "no"}) == found.ids
