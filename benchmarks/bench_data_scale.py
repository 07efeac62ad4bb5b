"""Memory and time of a preparation as the rows grow: 20 000, 200 000 and 2 000 000 synthetic rows
of one short round.

Every size runs in a process of its own. Its resident memory is sampled twice a second and its peak
taken from the kernel; the workers' is theirs alone. Memory that does not grow with the rows shows
as a flat curve, linear time as equal rows per second.

    python benchmarks/bench_data_scale.py [--sizes 20000 200000 2000000] [--deduplicate] [--output
    results.json]
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from data_case import CORES, machine, make_tokenizer

WORDS = (
    "time year people way day thing world life hand part child eye place work week case point "
    "company number"
).split()
VERBS = "take make know see find give tell call try ask need feel leave keep".split()


def write_rows(rows: int, path: Path, seed: int = 0) -> None:
    """One question and one answer of some five words; a number makes every row another."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            said = [
                " ".join(rng.choice(WORDS if k % 2 else VERBS) for k in range(rng.randint(3, 6)))
                for _ in range(2)
            ]
            messages = [
                {"from": "human", "content": f"{said[0]} {number}?"},
                {"from": "assistant", "content": said[1]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


class Sampler(threading.Thread):
    """The resident memory of this process over time, in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self.samples.append(resident_mib())

    def end(self, points: int = 20) -> list[float]:
        """At most ``points`` of the samples, evenly spread."""
        self._ended.set()
        self.join()
        step = max(1, len(self.samples) // points)
        return [round(value, 1) for value in self.samples[::step]]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def prepare(data: Path, folder: Path, deduplicate: bool) -> dict:
    """One preparation in this process: both outputs, all cores."""
    # Imported before memory is measured: its share does not depend on the rows.
    import datasets  # noqa: F401

    from coati.dataset import prepare_dataset, setup_conversation_template
    from coati.dataset.clean.cleaning import Cleaning

    tokenizer = make_tokenizer(None)
    template = setup_conversation_template(tokenizer, {})
    before = resident_mib()
    sampler = Sampler()
    sampler.start()
    start = time.perf_counter()
    report = prepare_dataset(
        inputs=[data],
        tokenizer=tokenizer,
        template=template,
        arrow_dir=folder / "arrow",
        jsonl_dir=folder / "jsonl",
        cache_dir=folder / "cache",
        show=None,
        cleaning=Cleaning(deduplicate=deduplicate),
    )
    seconds = time.perf_counter() - start
    used, of_workers = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "rows": report["rows_in_files"],
        "rows_written": report["rows_written"],
        "tokens": report["tokens"],
        "seconds": round(seconds, 3),
        "rows_per_second": round(report["rows_in_files"] / seconds, 1),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in (used, of_workers)), 1),
        "resident_mib_before": round(before, 1),
        "peak_resident_mib": round(used.ru_maxrss / 1024, 1),
        "peak_resident_mib_of_largest_worker": round(of_workers.ru_maxrss / 1024, 1),
        "resident_mib_over_time": sampler.end(),
    }


def main(args: argparse.Namespace) -> None:
    from coati.utils.json_io import save_json

    results = {
        "machine": machine(),
        "processes": CORES,
        "deduplicate": args.deduplicate,
        "sizes": [],
    }
    for rows in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as name:
            data = Path(name) / "rows.jsonl"
            write_rows(rows, data)
            command = [
                sys.executable,
                __file__,
                "--one",
                str(data),
                *(["--deduplicate"] if args.deduplicate else []),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            found |= {
                "input_mib": round(data.stat().st_size / 2**20, 1),
                "load_average": round(os.getloadavg()[0], 2),
            }
        results["sizes"].append(found)
        print(
            f"{rows} rows: {found['seconds']} s, {found['rows_per_second']} rows/s, peak "
            f"{found['peak_resident_mib']} MiB resident (before: {found['resident_mib_before']})",
            flush=True,
        )
        if args.output:
            save_json(results, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[20_000, 200_000, 2_000_000])
    parser.add_argument(
        "--deduplicate", action="store_true", help="compare the rows in a pass of their own first"
    )
    parser.add_argument(
        "--scratch", help="folder with some GB of room; default: the system's for temporary files"
    )
    parser.add_argument("--output", help="JSON file for the results, written after each size")
    parser.add_argument(
        "--one", type=Path, help=argparse.SUPPRESS
    )  # measure this file and print JSON
    arguments = parser.parse_args()
    if arguments.one is None:
        main(arguments)
    else:
        print(
            json.dumps(prepare(arguments.one, arguments.one.parent / "out", arguments.deduplicate))
        )
