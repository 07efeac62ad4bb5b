"""From files to shards: exact numbers, the same result on any number of cores, whole or absent,
everything reported."""

import json
from pathlib import Path

import pytest

from coati.dataset import load_tokenized_dataset, prepare_dataset, setup_conversation_template
from coati.dataset.prepare.shard_plan import plan_bins
from coati.dataset.prepare.staging import check_outputs
from coati.dataset.prepare.write_pass import TokenizeWorker
from tests.dataset.makers import chatml_tokenizer

SAMPLE = Path(__file__).parents[3] / "examples" / "data" / "sft.jsonl"


def row(*contents: str, roles=("human", "assistant")) -> dict:
    return {
        "messages": [{"from": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


def write(path: Path, *rows) -> Path:
    lines = [
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run(folder: Path, *inputs: Path, **settings) -> dict:
    tokenizer = chatml_tokenizer()
    return prepare_dataset(
        inputs=inputs,
        tokenizer=tokenizer,
        tokenizer_name="tiny",
        template=setup_conversation_template(tokenizer, {}),
        arrow_dir=folder / "arrow",
        jsonl_dir=folder / "jsonl",
        cache_dir=folder / "cache",
        **{"num_proc": 1, "show": None, **settings},
    )


def lines(folder: Path) -> list[list[dict]]:
    """The rows of each shard."""
    return [
        [json.loads(line) for line in open(path)]
        for path in sorted((folder / "jsonl").glob("part-*.jsonl"))
    ]


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(SAMPLE.open(encoding="utf-8").readlines()[:400]), encoding="utf-8")
    one, three = (
        run(tmp_path / str(n), data, num_proc=n, max_length=512, num_bins=3) for n in (1, 3)
    )
    assert one == three
    for name in ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl", "report.json"]:
        texts = [(tmp_path / str(n) / "jsonl" / name).read_bytes() for n in (1, 3)]
        assert texts[0] == texts[1] and texts[0]
    tables = [load_tokenized_dataset(str(tmp_path / str(n) / "arrow")).data.table for n in (1, 3)]
    assert tables[0].equals(tables[1])


def test_a_cache_folder_is_left_as_it_was(tmp_path):
    """One that was not there is gone, an empty one stays, one with something in it keeps it."""
    run(tmp_path / "new", SAMPLE, max_length=512)
    assert not (tmp_path / "new" / "cache").exists()
    (tmp_path / "old" / "cache").mkdir(parents=True)
    run(tmp_path / "old", SAMPLE, max_length=512)
    assert list((tmp_path / "old" / "cache").iterdir()) == []
    (tmp_path / "used" / "cache").mkdir(parents=True)
    (tmp_path / "used" / "cache" / "mine").touch()
    run(tmp_path / "used", SAMPLE, max_length=512)
    assert [path.name for path in (tmp_path / "used" / "cache").iterdir()] == ["mine"]


def test_arrow_and_jsonl_hold_the_same_rows_in_the_order_of_the_file(tmp_path):
    report = run(tmp_path, SAMPLE, max_length=512, num_bins=3)
    jsonl = [line for shard in lines(tmp_path) for line in shard]
    arrow = load_tokenized_dataset([str(tmp_path / "arrow" / f"part-{i:05d}") for i in range(3)])
    assert arrow.to_list() == jsonl and report["shards"] == [
        len(shard) for shard in lines(tmp_path)
    ]
    assert list(jsonl[0]) == [
        "input_ids",
        "labels",
        "inputs_decode",
        "labels_decode",
        "seq_length",
        "seq_category",
    ]
    for made in jsonl:
        assert len(made["input_ids"]) == len(made["labels"]) == made["seq_length"] <= 512
        assert all(
            label in (-100, token)
            for token, label in zip(made["input_ids"], made["labels"], strict=True)
        )
    answers = [
        [m["content"] + "<|im_end|>" for m in json.loads(line)["messages"][1::2]]
        for line in open(SAMPLE)
    ]
    whole = {json.dumps(made["labels_decode"]) for made in jsonl}
    assert whole <= {json.dumps(a[:n]) for a in answers for n in range(1, len(a) + 1)}


@pytest.mark.parametrize("total", [1, 7, 100, 663, 12345])
@pytest.mark.parametrize("bins", [1, 3, 10, 30, 150])
def test_bins_are_exact_and_even(total, bins):
    planned = plan_bins(total, bins)
    sizes = [bin.end - bin.start for bin in planned]
    assert [bin.start for bin in planned] == [0, *[bin.end for bin in planned[:-1]]] and planned[
        -1
    ].end == total
    assert len(sizes) == bins and sum(sizes) == total and max(sizes) - min(sizes) <= 1


def test_exactly_as_many_shards_as_asked_for(tmp_path):
    data = write(tmp_path / "a.jsonl", *[row(f"q{i}", f"a{i}") for i in range(7)])
    report = run(tmp_path, data, num_bins=30)
    assert sum(report["shards"]) == 7 and len(report["shards"]) == 30
    assert (
        len(list((tmp_path / "arrow").glob("part-*")))
        == len(list((tmp_path / "jsonl").glob("part-*")))
        == 30
    )
    assert len(load_tokenized_dataset(str(tmp_path / "arrow"))) == 7


def test_one_row_in_ten_bins_stands_in_the_sixth(tmp_path):
    run(tmp_path, write(tmp_path / "a.jsonl", row("q", "a")))
    assert [len(shard) for shard in lines(tmp_path)] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_sample_is_drawn_from_each_bin_and_the_seed_decides(tmp_path):
    data = write(tmp_path / "a.jsonl", *[row(f"q{i}", str(i)) for i in range(40)])
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, data, num_bins=4, num_samples_per_bin=3, seed=seed)
        drawn[name] = [
            [int(made["labels_decode"][0][:-10]) for made in shard]
            for shard in lines(tmp_path / name)
        ]
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert all(
        len(set(shard)) == 3 and min(shard) >= 10 * i and max(shard) < 10 * i + 10
        for i, shard in enumerate(drawn["c"])
    )
    run(tmp_path / "more", data, num_bins=4, num_samples_per_bin=99)
    assert [len(shard) for shard in lines(tmp_path / "more")] == [10] * 4


BAD = {
    2: ('{"messages": [', "bad_json"),
    3: ({"txet": "x"}, "wrong_keys"),
    4: (row("q", "a", roles=("human", "narrator")), "unknown_role"),
    5: (row("q", "q", roles=("human", "human")), "roles_not_alternating"),
    6: ({"messages": []}, "empty_conversation"),
    7: (row("q"), "no_assistant_turn"),
    8: (row("q", " "), "empty_answer"),
    9: (row("q", "long " * 200), "too_long"),
    10: (row("q", 7), "content_not_text"),
}


def test_bad_rows_are_dropped_counted_and_named(tmp_path):
    data = write(
        tmp_path / "a.jsonl",
        row("q", "a"),
        *[bad for bad, _ in BAD.values()],
        row("q", "a", "q", "long " * 200),
    )
    report = run(tmp_path, data, max_length=100, num_bins=2, max_bad_ratio=1)
    assert (
        report["rows_read"],
        report["rows_kept"],
        report["rows_dropped"],
        report["rows_truncated"],
    ) == (11, 2, 9, 1)
    for line, (_, reason) in BAD.items():
        entry = report["dropped"][reason]
        assert entry["rows"] == 1 and len(entry["first"]) == 1
        assert (
            entry["first"][0].startswith(f"{data}:{line}: ")
            and len(entry["first"][0]) > len(f"{data}:{line}: ") + 5
        )
    assert [made["labels_decode"] for shard in lines(tmp_path) for made in shard] == [
        ["a<|im_end|>"]
    ] * 2


def test_the_first_few_of_a_reason_are_named(tmp_path):
    data = write(tmp_path / "a.jsonl", row("q", "a"), *["{"] * 300)
    entry = run(tmp_path, data, num_proc=2, max_bad_ratio=1)["dropped"]["bad_json"]
    assert entry["rows"] == 300 and [text.split(": ")[0] for text in entry["first"]] == [
        f"{data}:{n}" for n in (2, 3, 4)
    ]


def test_strict_ends_at_the_first_malformed_row(tmp_path):
    data = write(tmp_path / "a.jsonl", row("q", "a"), "{", row("q", "long " * 200))
    with pytest.raises(ValueError, match=f"{data}:2: .*JSON"):
        run(tmp_path, data, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    run(
        tmp_path,
        write(tmp_path / "b.jsonl", row("q", "a"), row("q", "long " * 200)),
        max_length=100,
        strict=True,
    )


def test_the_report_by_hand(tmp_path):
    """ "a" is one token: 1 user \\n q 2 \\n 1 assistant \\n a 2, of which "a" and the end marker
    are trained."""
    tokenizer = chatml_tokenizer()
    length = (
        8
        + sum(
            len(tokenizer.encode(word, add_special_tokens=False)) for word in ("user", "assistant")
        )
        + 1
    )
    first = write(tmp_path / "a.jsonl", row("q", "a"), row("q", "a"))
    second = write(tmp_path / "b.jsonl", "{", row("q", "a", "q", "a"))
    report = run(tmp_path, first, second, num_bins=2, max_bad_ratio=0.5)
    assert (
        report["rows_in_files"] == 4 and report["shards"] == [2, 1] and report["rows_written"] == 3
    )
    assert report["tokens"] == 4 * length + 1 and report["supervised_tokens"] == 8
    assert report["supervised_share"] == round(8 / (4 * length + 1), 4)
    assert report["length"]["min"] == report["length"]["p50"] == length
    assert report["length"]["max"] == report["length"]["p99"] == 2 * length + 1
    assert report["files"] == [
        {"file": str(first), "rows_read": 2, "rows_kept": 2},
        {"file": str(second), "rows_read": 2, "rows_kept": 1},
    ]
    before = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    parts = [{"name": "", "text": [[False, before], [True, "a<|im_end|>"]]}]
    assert report["samples"][0] == {
        "at": f"{first}:1",
        "notes": {"shape": "messages"},
        "parts": parts,
    }
    assert json.loads((tmp_path / "jsonl" / "report.json").read_text()) == report


def test_what_training_needs_to_know_stands_beside_the_shards(tmp_path):
    report = run(tmp_path, write(tmp_path / "a.jsonl", row("q", "a")), max_length=64)
    stored = json.loads((tmp_path / "arrow" / "preparation.json").read_text())
    assert (
        stored["type"] == "sft"
        and stored["max_length"] == 64
        and stored["rows"] == 1
        and stored["report"] == report
    )
    tokenizer = chatml_tokenizer()
    assert stored["tokenizer"]["path"] == "tiny" and stored["tokenizer"]["vocab_size"] == len(
        tokenizer
    )
    conversation = setup_conversation_template(
        tokenizer, tmp_path / "arrow" / "conversation_template.json"
    )
    assert conversation.to_config() == stored["conversation_template"]
    tokenizer.add_tokens(["new"])
    from coati.dataset.fingerprint import tokenizer_fingerprint

    assert (
        tokenizer_fingerprint(chatml_tokenizer())
        == stored["tokenizer"]["fingerprint"]
        != tokenizer_fingerprint(tokenizer)
    )


def test_nothing_left_ends_the_job_and_leaves_nothing(tmp_path):
    data = write(tmp_path / "a.jsonl", "{", row("q", "long " * 200))
    with pytest.raises(ValueError) as error:
        run(tmp_path, data, max_length=50, max_bad_ratio=1)
    said = str(error.value)
    assert (
        "nothing left" in said
        and f"{data}:1" in said
        and "too_long" in said
        and f"{data}:2" in said
    )
    assert not (tmp_path / "arrow").exists() and not (tmp_path / "jsonl").exists()


def test_one_file_of_several_with_nothing_left_is_said(tmp_path, capsys):
    good, bad = write(tmp_path / "a.jsonl", row("q", "a")), write(tmp_path / "b.jsonl", "{", "{")
    run(tmp_path, good, bad, max_bad_ratio=1)
    assert f"{bad}: none of its 2 rows was kept" in capsys.readouterr().err


def test_empty_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl: no rows found"):
        run(tmp_path, write(tmp_path / "a.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no data file"):
        run(tmp_path, tmp_path / "folder")


@pytest.mark.parametrize("name", ["arrow", "jsonl"])
def test_an_output_that_exists_is_refused_and_untouched(name, tmp_path):
    data = write(tmp_path / "a.jsonl", row("q", "a"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("x")
    with pytest.raises(
        ValueError, match=f"{name} exists already; name another folder, or remove it"
    ):
        run(tmp_path, data)
    assert (tmp_path / name / "mine").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.jsonl", name])


def test_settings_that_cannot_work_are_refused(tmp_path):
    data = write(tmp_path / "a.jsonl", row("q", "a"))
    for settings in (
        {"type": "poem"},
        {"max_length": 1},
        {"num_bins": 0},
        {"num_bins": 100_000},
        {"num_samples_per_bin": 0},
    ):
        with pytest.raises(ValueError, match=str(*settings.values())):
            run(tmp_path, data, **settings)
    with pytest.raises(ValueError, match="two folders"):
        check_outputs(tmp_path / "x", tmp_path / "y" / ".." / "x")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    data = write(tmp_path / "a.jsonl", *[row("q", "a")] * 3)
    monkeypatch.setattr("coati.dataset.prepare.shards._describe_shard", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, data)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_worker_that_dies_ends_the_job(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(TokenizeWorker, "run", lambda *_: os._exit(9))
    data = write(tmp_path / "a.jsonl", *[row("q", "a")] * 300)
    with pytest.raises(OSError, match="worker process died.*--num_proc"):
        run(tmp_path, data, num_proc=2)
    assert not (tmp_path / "arrow").exists()


def test_training_on_a_raw_file_needs_no_jsonl(tmp_path):
    tokenizer = chatml_tokenizer()
    alpaca = SAMPLE.with_name("sft_alpaca.json")
    report = prepare_dataset(
        inputs=[alpaca],
        tokenizer=tokenizer,
        template=setup_conversation_template(tokenizer, {}),
        arrow_dir=tmp_path / "arrow",
        num_bins=1,
        show=None,
    )
    assert report["rows_kept"] == 12 and [path.name for path in tmp_path.iterdir()] == ["arrow"]


def test_the_samples_of_training_and_evaluation_share_nothing():
    texts = []
    for path in (SAMPLE, SAMPLE.with_name("sft_eval.jsonl")):
        conversations = [
            [m["content"].strip().lower() for m in json.loads(line)["messages"]]
            for line in open(path)
        ]
        long = {text for turns in conversations for text in turns if len(text) > 30}
        questions = {turns[0] for turns in conversations if len(turns) == 2}
        texts.append((len(conversations), long, questions))
    assert 600 <= texts[0][0] <= 900 and 60 <= texts[1][0] <= 80
    assert not texts[0][1] & texts[1][1] and not texts[0][2] & texts[1][2]
