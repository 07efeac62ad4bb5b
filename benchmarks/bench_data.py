"""Rows per second of preparing each type of data, beside `datasets.map` with the same tokenizer.

The other way is what one writes in an hour with `datasets` and `transformers`: load the JSON lines,
map a function over single rows with one process per core, filter, save to disk. The function
renders and tokenizes with `apply_chat_template` and finds the loss mask by tokenizing the text
before each answer. Both write arrow files and no JSON lines (--jsonl: ours writes them too). Ours
also decodes the rows for people to read, checks every row, and reports.

The two take turns on the same input file; the ratio of each turn is reported, and their median.

    python benchmarks/bench_data.py [--rows 8000] [--turns 3] [--types sft kto] [--tokenizer_dir
    MODEL] [--output F]
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_case import CORES, EXAMPLES, machine, make_tokenizer

ROLES = {"human": "user", "gpt": "assistant"}
IGNORE = -100


def messages_of(turns: list[dict]) -> list[dict]:
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["content"]}
        for turn in turns
    ]


def masked(tokenizer, messages: list[dict], answers: list[int]) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation and, 1 or 0 for each, whether it belongs to one of the answers at
    these places."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    mask = [0] * len(ids)
    for place in answers:
        start = len(
            tokenizer.apply_chat_template(
                messages[:place], add_generation_prompt=True, return_dict=False
            )
        )
        end = len(tokenizer.apply_chat_template(messages[: place + 1], return_dict=False))
        mask[start:end] = [1] * (end - start)
    return ids, mask


def sft(row: dict, tokenizer, max_length: int) -> dict:
    messages = messages_of(row["messages"])
    ids, mask = masked(
        tokenizer, messages, [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    )
    labels = [token if kept else IGNORE for token, kept in zip(ids, mask, strict=True)]
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length],
        "keep": any(mask[:max_length]),
    }


def prompt(row: dict, tokenizer, max_length: int) -> dict:
    ids = tokenizer.apply_chat_template(
        messages_of(row["messages"]), add_generation_prompt=True, return_dict=False
    )
    return {"input_ids": ids, "keep": len(ids) <= max_length}


def preference(row: dict, tokenizer, max_length: int) -> dict:
    made: dict[str, Any] = {"keep": True}
    for side in ("chosen", "rejected"):
        messages = messages_of(row["context"] + row[side])
        ids, mask = masked(tokenizer, messages, [len(messages) - 1])
        made |= {f"{side}_input_ids": ids, f"{side}_loss_mask": mask}
        made["keep"] &= len(ids) <= max_length
    return made


def kto(row: dict, tokenizer, max_length: int) -> dict:
    messages = messages_of([*row["prompt"], row["completion"]])
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    start = len(
        tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    )
    return {
        "prompt": ids[:start],
        "completion": ids[start:],
        "label": row["label"],
        "keep": len(ids) <= max_length,
    }


CONVERT: dict[str, Callable[..., dict]] = {
    "sft": sft,
    "prompt": prompt,
    "preference": preference,
    "kto": kto,
}


def by_map(type: str, data: Path, folder: Path, tokenizer, max_length: int) -> int:
    import datasets

    datasets.disable_progress_bars()
    raw = datasets.load_dataset(
        "json", data_files=str(data), cache_dir=str(folder / "cache"), split="train"
    )
    convert = partial(CONVERT[type], tokenizer=tokenizer, max_length=max_length)
    made = raw.map(
        convert, num_proc=CORES, remove_columns=raw.column_names, load_from_cache_file=False
    )
    kept = made.filter(
        lambda keep: keep, input_columns="keep", num_proc=CORES, load_from_cache_file=False
    )
    kept.save_to_disk(str(folder / "arrow"))
    return len(kept)


def by_us(type: str, data: Path, folder: Path, template, max_length: int, jsonl: bool) -> int:
    from coati.dataset import prepare_dataset

    report = prepare_dataset(
        inputs=[data],
        type=type,
        tokenizer=template.tokenizer,
        template=template,
        max_length=max_length,
        show=None,
        arrow_dir=folder / "arrow",
        jsonl_dir=folder / "jsonl" if jsonl else None,
        cache_dir=folder / "cache",
    )
    return report["rows_written"]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def write_rows(type: str, rows: int, path: Path) -> None:
    """``rows`` sample rows, each told apart from its repetitions by a number in its text."""
    lines = [json.loads(line) for line in open(EXAMPLES / f"{type}.jsonl", encoding="utf-8")]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row = lines[number % len(lines)]
            first = next(row[key] for key in ("messages", "context", "prompt") if row.get(key))[0]
            told = {**first, "content": f"{first['content']} ({number})"}
            key = next(key for key in ("messages", "context", "prompt") if row.get(key))
            file.write(json.dumps({**row, key: [told, *row[key][1:]]}, ensure_ascii=False) + "\n")


def measure(type: str, args: argparse.Namespace, tokenizer, template) -> dict:
    """Both ways in turns, each beginning every other turn."""
    ways = {
        "map": partial(by_map, tokenizer=tokenizer),
        "coati": partial(by_us, template=template, jsonl=args.jsonl),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    written = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "rows.jsonl"
        write_rows(type, args.rows, data)
        for turn in range(args.turns):
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                folder = Path(name) / f"{way}{turn}"
                start = time.perf_counter()
                used = cpu_seconds()
                written[way] = ways[way](type, data, folder, max_length=args.max_length)
                seconds[way].append(time.perf_counter() - start)
                cpu[way].append(cpu_seconds() - used)
    ratios = [theirs / ours for theirs, ours in zip(seconds["map"], seconds["coati"], strict=True)]
    cpu_ratios = [theirs / ours for theirs, ours in zip(cpu["map"], cpu["coati"], strict=True)]
    return {
        "rows": args.rows,
        "rows_written": written["coati"],
        "rows_written_by_map": written["map"],
        "rows_per_second": round(args.rows / statistics.median(seconds["coati"]), 1),
        "rows_per_second_of_map": round(args.rows / statistics.median(seconds["map"]), 1),
        "ratio_of_each_turn": [round(ratio, 2) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 2),
        "ratio_of_cpu_seconds": round(statistics.median(cpu_ratios), 2),
    }


def main(args: argparse.Namespace) -> None:
    import datasets  # noqa: F401  (its import is no part of either way)

    from coati.dataset import setup_conversation_template
    from coati.utils.json_io import save_json

    tokenizer = make_tokenizer(args.tokenizer_dir)
    template = setup_conversation_template(tokenizer, args.conversation_template_config)
    results: dict[str, Any] = {
        "machine": machine(),
        "processes": CORES,
        "vocabulary": len(tokenizer),
        "types": {},
    }
    for type in args.types:
        results["types"][type] = found = measure(type, args, tokenizer, template)
        print(
            f"{type}: {found['rows_per_second']:.0f} rows/s, datasets.map "
            f"{found['rows_per_second_of_map']:.0f}: {found['ratio']:.2f} times as fast (turns "
            f"{found['ratio_of_each_turn']}; processor time: {found['ratio_of_cpu_seconds']:.2f})",
            flush=True,
        )
        if args.output:
            save_json(results, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", choices=CONVERT, default=list(CONVERT))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--tokenizer_dir", help="default: a byte-level BPE trained on the sample rows"
    )
    parser.add_argument(
        "--conversation_template_config", help="default: the tokenizer's own template"
    )
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument(
        "--jsonl", action="store_true", help="ours writes JSON lines beside the arrow files"
    )
    parser.add_argument("--output", help="JSON file for the results")
    main(parser.parse_args())
