"""Rows per second of data preparation, beside the older way: a slow tokenizer fed piece by piece.

Both prepare the same rows with the same number of processes into the same layout (jsonl and arrow
shards). The older way renders a conversation once, searches each content in the text, tokenizes
every piece by itself with the pure-Python tokenizer, and goes through ``datasets``: json in, map,
filter, json out, json in again, arrow out.

    python benchmarks/bench_data_piecewise.py [--tokenizer_dir MODEL] [--repeat 4] [--output
    results.json]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # processes are the parallelism, in both ways

from coati.dataset import prepare_dataset, setup_conversation_template  # noqa: E402
from coati.utils.json_io import save_json  # noqa: E402

SAMPLE = Path(__file__).resolve().parents[1] / "examples" / "data" / "sft.jsonl"
IGNORE = -100


def slow_twin(tokenizer, folder: Path):
    """The pure-Python tokenizer of the same byte-level BPE vocabulary, template and control tokens
    included."""
    from transformers import GPT2Tokenizer

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        sys.exit(
            "bench_data_piecewise.py: the comparison needs a byte-level BPE tokenizer, found "
            f"{model['type']}"
        )
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    names = {
        name: tokenizer.special_tokens_map.get(name)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    slow = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **names)
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    slow.add_special_tokens({"additional_special_tokens": control})
    slow.chat_template = tokenizer.chat_template
    return slow


def pieces_of(messages: list[dict], text: str, end_of_assistant: str) -> list[tuple[str, bool]]:
    """The rendered text cut at the contents, which are searched for: ``(piece, supervised)``."""
    pieces = []
    position = 0
    for message in messages:
        start = text.find(message["content"], position)
        end = start + len(message["content"])
        if message["role"] == "assistant":
            end = text.find(end_of_assistant, end) + len(end_of_assistant)
        if start > 0 and text[start - 1] == " ":
            start -= 1
        pieces += [(text[position:start], False), (text[start:end], message["role"] == "assistant")]
        position = end
    return pieces


def piecewise(
    row: dict, tokenizer, system: str | None, end_of_assistant: str, max_length: int
) -> dict:
    """One row the older way; pieces are added while they fit."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = [
        {"role": roles.get(m["from"], m["from"]), "content": m["content"]} for m in row["messages"]
    ]
    turns = ([{"role": "system", "content": system}] if system else []) + turns
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = []
    labels = []
    for piece, supervised in pieces_of(turns, text, end_of_assistant):
        new = tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) + len(new) > max_length:
            break
        ids, labels = ids + new, labels + (new if supervised else [IGNORE] * len(new))
    last = max((i for i, label in enumerate(labels) if label != IGNORE), default=-1) + 1
    return {
        "input_ids": ids[:last] or None,
        "labels": labels[:last] or None,
        "inputs_decode": tokenizer.decode(ids[:last]),
        "labels_decode": tokenizer.decode([label for label in labels[:last] if label != IGNORE]),
        "seq_length": last,
        "seq_category": row.get("category"),
    }


def prepare_piecewise(data: Path, folder: Path, convert, bins: int, num_proc: int) -> int:
    """Percent slices through ``datasets``, as the older pipeline did. Returns the rows written."""
    import datasets

    datasets.disable_progress_bars()
    rows = 0
    for number in range(bins):
        part = f"part-{number:05d}"
        split = f"train[{100 * number // bins}%:{100 * (number + 1) // bins}%]"
        raw = datasets.load_dataset(
            "json", data_files=str(data), cache_dir=str(folder / "raw"), split=split
        )
        made = raw.map(convert, num_proc=min(num_proc, len(raw))).filter(
            lambda row: row["input_ids"] is not None
        )
        (folder / "jsonl").mkdir(parents=True, exist_ok=True)
        made.to_json(str(folder / "jsonl" / f"{part}.jsonl"), force_ascii=False)
        again = datasets.load_dataset(
            "json",
            data_files=str(folder / "jsonl" / f"{part}.jsonl"),
            cache_dir=str(folder / "tokenized"),
            split="train",
        )
        again.save_to_disk(str(folder / "arrow" / part))
        rows += len(again)
    return rows


def one_process_rates(rows: list[dict], ours, theirs) -> tuple[float, float]:
    """Rows per CPU second of the conversion alone. Every row once: a word seen before is cheap for
    either tokenizer.

    The two take turns, a few rows each, so that whatever else the machine does slows both alike.
    """
    seconds = [0.0, 0.0]
    for convert in (ours, theirs):
        convert(
            {
                "messages": [
                    {"from": "human", "content": "warm"},
                    {"from": "assistant", "content": "up"},
                ]
            }
        )
    for first in range(0, len(rows), 20):
        for way, convert in enumerate((ours, theirs)):
            start = time.process_time()
            for row in rows[first : first + 20]:
                convert(row)
            seconds[way] += time.process_time() - start
    return len(rows) / seconds[0], len(rows) / seconds[1]


def figures(args: argparse.Namespace, rows: int, report: dict, seconds: dict, rates: tuple) -> dict:
    """``seconds`` of the whole preparation and ``rates`` of the conversion, of both ways."""
    return {
        "rows": rows,
        "rows_written": report["rows_written"],
        "processes": args.num_proc,
        "bins": args.bins,
        "tokens_per_row": report["length"]["mean"],
        "whole_rows_per_second": round(rows / seconds["new"], 1),
        "whole_rows_per_second_piecewise": round(rows / seconds["old"], 1),
        "whole_ratio": round(seconds["old"] / seconds["new"], 2),
        "convert_rows_per_cpu_second": round(rates[0], 1),
        "convert_rows_per_cpu_second_piecewise": round(rates[1], 1),
        "convert_ratio": round(rates[0] / rates[1], 2),
    }


def main(args: argparse.Namespace) -> None:
    from coati.dataset import tokenize_sft
    from coati.models.tokenizer import load_tokenizer

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import datasets  # noqa: F401  (half of either way's time otherwise, on so few rows)

    from tests.tiny import tiny_tokenizer

    tokenizer = load_tokenizer(args.tokenizer_dir) if args.tokenizer_dir else tiny_tokenizer()
    template = setup_conversation_template(tokenizer, args.conversation_template_config)
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        data.write_text("\n".join(lines * args.repeat) + "\n", encoding="utf-8")
        slow = slow_twin(tokenizer, folder)
        theirs = partial(
            piecewise,
            tokenizer=slow,
            system=template.system_message,
            end_of_assistant=template.end_of_assistant,
            max_length=args.max_length,
        )
        ours = partial(
            tokenize_sft,
            tokenizer=tokenizer,
            conversation_template=template,
            max_length=args.max_length,
        )
        alone = one_process_rates([json.loads(line) for line in lines], ours, theirs)
        start = time.perf_counter()
        report = prepare_dataset(
            inputs=[data],
            tokenizer=tokenizer,
            template=template,
            max_length=args.max_length,
            num_bins=args.bins,
            arrow_dir=folder / "arrow",
            jsonl_dir=folder / "jsonl",
            num_proc=args.num_proc,
            show=None,
        )
        new = time.perf_counter() - start
        start = time.perf_counter()
        prepare_piecewise(data, folder / "older", theirs, args.bins, args.num_proc)
        old = time.perf_counter() - start
    seconds = {"new": new, "old": old}
    results = figures(args, len(lines) * args.repeat, report, seconds, alone)
    print(json.dumps(results, indent=2))
    if args.output:
        save_json(results, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(SAMPLE), help="jsonl with rows of type sft")
    parser.add_argument(
        "--tokenizer_dir", help="byte-level BPE model directory; default: a tiny one made in memory"
    )
    parser.add_argument(
        "--conversation_template_config", help="default: the tokenizer's own template"
    )
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument(
        "--repeat", type=int, default=8, help="how often the rows are written into the input file"
    )
    parser.add_argument("--bins", type=int, default=10)
    parser.add_argument("--num_proc", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="JSON file for the results")
    main(parser.parse_args())
