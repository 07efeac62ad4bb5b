"""Continued pre-training from its words on: a text and conversations in one run, by weight, packed,
at a rate of their own for the embeddings; resumed to the bit after kill -9; what is written."""

import json
import math

import pytest

from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.inputs import metrics, weights
from tests.end_to_end.worker import Fault, Run
from tests.tiny import tiny_llama, tiny_tokenizer

CPU = {"CUDA_VISIBLE_DEVICES": ""}
SCRIPT = "train_pt.py"
TRAIN = "tests.end_to_end.worker:train_each"
AUTO = ("--checkpoint_path", "auto")


def text(first: int, lines: int) -> str:
    """Sentences of a kind, so that one that was not seen is likelier after training."""
    return "".join(
        f"Of {n % 7} and {n % 5} the sum is {n % 7 + n % 5}, and the product {n % 7 * (n % 5)}.\n"
        for n in range(first, first + lines)
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    files = {"train.txt": text(0, 130), "held.txt": text(200, 15)}
    files["few.jsonl"] = "".join(json.dumps({"text": text(n, 2)}) + "\n" for n in range(5))
    for name, content in files.items():
        (folder / name).write_text(content)
    return {name.partition(".")[0]: str(folder / name) for name in files}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model whose tokenizer has no chat template, as base models have none."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def words(model, data, texts):
    def words(save_dir, *more: str, batch: int = 2) -> list[str]:
        return [
            *("--pretrain", model, "--dataset", texts["train"], data["train"]),
            *("--dataset_weights", "0.8", "0.2", "--eval_dataset", texts["held"], data["eval"]),
            *("--max_length", "96", "--plugin", "zero2", "--mixed_precision", "fp32"),
            *("--batch_size", str(batch), "--accumulation_steps", "3", "--max_epochs", "2"),
            *("--lr", "3e-3", "--embedding_lr", "1e-3", "--save_interval", "3"),
            *("--eval_interval", "0", "--save_dir", str(save_dir), *more),
        ]

    return words


@pytest.fixture(scope="module")
def runs(tmp_path_factory, words):
    """Two processes: to the end; killed in the fifth step, then gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    whole = run(2, TRAIN, {"whole": Run(words(folder / "whole"), script=SCRIPT)}, env=CPU)[0]
    fault = Fault("step", 5, "before", rank=1)
    with pytest.raises(WorkerFailed, match="exit code -9"):
        run(2, TRAIN, {"killed": Run(words(folder / "killed"), fault, script=SCRIPT)}, env=CPU)
    again = Run(words(folder / "killed", *AUTO), script=SCRIPT)
    return folder, whole | run(2, TRAIN, {"again": again}, env=CPU)[0]


def test_a_killed_run_goes_on_to_the_bit(runs):
    folder, ended = runs
    assert [ended[name].code for name in ("whole", "again")] == [0, 0]
    assert len(ended["whole"].rows) > 7 and ended["again"].rows == ended["whole"].rows[3:]
    assert metrics(folder / "killed") == metrics(folder / "whole")
    assert weights(folder / "killed") == weights(folder / "whole") and weights(folder / "whole")


def test_one_process_reads_the_same_rows(runs, alone):
    folder, ended = runs
    rows = ended["whole"].rows
    assert alone[1]["both"].rows == rows
    lines = [line for line in metrics(folder / "whole") if "train/loss" in line]
    for epoch in (0, 1):  # the last step of each is the one that is not full
        sizes = [len(rows[i]) for i, line in enumerate(lines) if line["epoch"] == epoch]
        assert sizes[-1] == min(sizes) < max(sizes)


def test_perplexity_on_what_is_held_out_falls(runs):
    folder, ended = runs
    found = [line for line in metrics(folder / "whole") if "eval/perplexity" in line]
    assert found[-1]["eval/perplexity"] < 0.6 * found[0]["eval/perplexity"]
    for line in found:
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"]))
    said = ended["whole"].err
    assert "rows of type text" in said and "rows of type sft" in said
    assert "--packing: " in said and "--dataset_weights: of the " in said
    assert "fine-tune it: coati sft --pretrain " in said


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, texts, data, words):
    """Runs of one process, all but "both" on a model without chat template."""
    folder = tmp_path_factory.mktemp("alone")
    given = ["--pretrain", base, "--max_length", "64", "--batch_size", "4", "--max_steps", "3"]
    given += ["--accumulation_steps", "1", "--plugin", "ddp", "--lr", "1e-2"]
    held = ["--eval_dataset", texts["held"], "--eval_interval", "0"]
    lines = ["--dataset", texts["train"], "--documents", "line"]
    cases = {
        "file": ["--dataset", texts["train"], *held],
        "line": [*lines, "--packing", "false", "--dry_run"],
        "few": ["--dataset", texts["few"], "--batch_size", "64", "--eval_ratio", "0.4"],
        "tokens": ["--dataset", texts["train"], "--add_tokens", "product", "and the"],
        "adapters": ["--dataset", texts["train"], "--lora_rank", "4", "--embedding_lr", "1e-4"],
        "template": ["--dataset", texts["train"], data["train"].replace("arrow", "rows.jsonl")],
        "lines with adapters": [*lines, "--lora_rank", "4", "--add_tokens", "sum"],
        "stream": ["--dataset", texts["train"], "--streaming", "--stream_workers", "0"],
        "mixed stream": [
            *("--dataset", texts["train"], data["train"].replace("arrow", "rows.jsonl")),
            *("--streaming", "--stream_workers", "0"),
        ],
        "dry": ["--dataset", texts["train"], "--dry_run"],
    }
    tried = {
        name: Run([*given, *more, "--save_dir", str(folder / name)], script=SCRIPT)
        for name, more in cases.items()
    }
    tried["both"] = Run(words(folder / "both", batch=4), script=SCRIPT)
    return folder, run(1, TRAIN, tried, env=CPU, timeout=400)[0]


def test_a_base_model_needs_no_template(alone):
    folder, ended = alone
    assert ended["file"].code == 0, ended["file"].err
    assert "none is saved with the model" in ended["file"].err
    assert not (folder / "file" / "modeling" / "conversation_template.json").exists()
    lines = (folder / "file" / "samples.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) > 2 and prompts[0].startswith("Of 4 and 0 the")  # of what is held out


def test_what_of_a_file_is_a_document_decides_the_rows(alone):
    _, ended = alone
    tokenizer = tiny_tokenizer()
    lines = text(0, 130).splitlines()
    tokens = {
        "dry": len(tokenizer.encode(text(0, 130).rstrip())) + 1,
        "line": sum(len(tokenizer.encode(line)) + 1 for line in lines),
    }
    rows = {"dry": -(-tokens["dry"] // 64), "line": 130}
    for name in rows:
        assert ended[name].code == 0, ended[name].err
        assert f"rows {rows[name]}, tokens {tokens[name]} " in ended[name].err
        assert "a checkpoint of" in ended[name].err
    assert "--packing: " in ended["dry"].err and "--packing: " not in ended["line"].err


def test_texts_may_be_a_stream(alone):
    _, ended = alone
    assert ended["stream"].code == 0, ended["stream"].err
    assert "holds raw texts: preparing" not in ended["stream"].err
    (place,) = {row.partition(":")[0] for step in ended["stream"].rows for row in step}
    assert place.endswith("train.txt")


def test_fewer_rows_than_a_step_needs_are_one_step(alone):
    _, ended = alone
    assert ended["few"].code == 0, ended["few"].err
    assert len(ended["few"].rows) == 1 and 2 <= len(ended["few"].rows[0]) <= 8


def test_added_tokens_start_as_the_mean_and_are_trained(alone, base):
    from safetensors.torch import load_file

    from coati.models.tokenizer import load_tokenizer

    folder, ended = alone
    for name, new in (("tokens", 2), ("lines with adapters", 1)):
        assert ended[name].code == 0, ended[name].err
        assert f"added {new} tokens" in ended[name].err and "start as the mean" in ended[name].err
    saved = folder / "tokens" / "modeling"
    tokenizer = load_tokenizer(str(saved))
    ids = tokenizer.convert_tokens_to_ids(["product", "and the"])
    first = len(tiny_tokenizer())
    assert ids == [first, first + 1] and tokenizer.encode("product") == ids[:1]
    table = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
    before = load_file(f"{base}/model.safetensors")["model.embed_tokens.weight"]
    assert table.shape == before.shape  # rows that the model had to spare
    moved = (table[ids] - before[:first].mean(0)).abs().max(1).values
    assert moved.min() > 1e-3  # three steps of 1e-2 at most
    assert moved.max() < 0.1


def test_what_is_refused(alone):
    _, ended = alone
    assert ended["adapters"].code == 1 and ended["template"].code == 1
    assert "--embedding_lr: embedding and head are not trained" in ended["adapters"].err
    assert "holds conversations, and the tokenizer has no chat template" in ended["template"].err
    mixed = ended["mixed stream"]
    # This model has no template: conversations can be mixed in where there is one.
    assert mixed.code == 1 and "holds conversations, and the tokenizer has no" in mixed.err
    for name in ("adapters", "template", "mixed stream"):
        assert "Traceback" not in ended[name].err
