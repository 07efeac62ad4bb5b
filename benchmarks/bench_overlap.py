"""What asking one episode ahead gains: episodes of GRPO with --rollouts_ahead 1 beside 0.

Two processes, each on a processor core of its own, as two machines would be: a rollout server
(`coati rollout-server --engine own`) and the training. Both ways have the same two processes and
the same work: a Llama of 28M parameters in fp32, --prompts prompts with --generations responses of
--new_tokens tokens an episode, one pass over them. With 0 one core waits while the other works;
with 1 the server samples the next episode while this one is trained. The ways take turns, a run of
--episodes each; the first two episodes of a run are not counted, nor is its last, during which
nothing is left to ask for. An episode ends with the line of its metrics. The published weights go
by --rollout_sync http, and their writing and fetching are within the time.

    python benchmarks/bench_overlap.py [--episodes 9] [--rounds 2] [--output results.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import online_case, sft_case  # noqa: E402
from benchmarks.bench_publish import server_of  # noqa: E402

ROOT = sft_case.ROOT
WARM_UP = 2
AHEAD = (0, 1)
PARTS = ("seconds_rollout", "seconds_scoring", "seconds_update")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=9, help="of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--one_run", help=argparse.SUPPRESS)
    return parser.parse_args()


def on_core(number: int) -> None:
    """Bind this process to one of the cores that it may use."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("this benchmark needs two processor cores: one for the server, one for training")
    os.sched_setaffinity(0, {cores[number]})


def one_thread() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(args: argparse.Namespace, url: str, ahead: int) -> list[dict]:
    """The metrics of a run's episodes, with the ``seconds`` that each took."""
    case = vars(args) | {"url": url, "ahead": ahead}
    done = subprocess.run(
        [sys.executable, __file__, "--one_run", json.dumps(case)],
        stdout=subprocess.PIPE,
        text=True,
        env=one_thread(),
        preexec_fn=lambda: on_core(1),
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def one_run(case: dict) -> list[dict]:
    """What :func:`run` gives, in this process."""
    import coati

    folder = online_case.prepare()
    episodes: list[dict] = []

    class Clock(coati.Callback):
        ended = 0.0

        def on_log(self, trainer, metrics: dict[str, float]) -> None:
            now = time.perf_counter()
            parts = {name: metrics[f"train/{name}"] for name in PARTS}
            episodes.append({"seconds": now - self.ended} | parts)
            self.ended = now

    template = ROOT / "config" / "conversation_template" / sft_case.TEMPLATE
    with tempfile.TemporaryDirectory() as save_dir:
        coati.grpo(
            str(folder / "model"),
            str(ROOT / "examples" / "data" / "prompt.jsonl"),
            reward=[score],
            callbacks=[Clock()],
            conversation_template_config=str(template),
            save_dir=save_dir,
            plugin="ddp",
            mixed_precision="fp32",
            num_episodes=case["episodes"],
            num_collect_steps=1,
            num_update_steps=1,
            experience_batch_size=case["prompts"],
            accumulation_steps=1,
            num_generations=case["generations"],
            train_batch_size=case["prompts"] * case["generations"],
            max_seq_len=case["new_tokens"],
            max_length=online_case.LONGEST_PROMPT + case["new_tokens"],
            rollout_url=[case["url"]],
            rollouts_ahead=case["ahead"],
            lr=online_case.LEARNING_RATE,
            log_interval=1,
            sample_interval=0,
            save_interval=0,
            seed=1,
        )
    return episodes


def score(responses: list[str]) -> list[float]:
    return online_case.score(responses)


def measure(args: argparse.Namespace) -> dict[int, list[dict]]:
    """{episodes ahead: the counted episodes of all runs}."""
    found: dict[int, list[dict]] = {ahead: [] for ahead in AHEAD}
    model = online_case.prepare() / "model"
    with server_of(model, env=one_thread(), preexec_fn=lambda: on_core(0)) as url:
        for number in range(args.rounds):
            for ahead in AHEAD if number % 2 else reversed(AHEAD):
                found[ahead] += run(args, url, ahead)[WARM_UP:-1]
    return found


def main() -> None:
    args = parse()
    if args.one_run:
        print(json.dumps(one_run(json.loads(args.one_run))))
        return
    found = measure(args)
    medians = {
        ahead: {name: median(row[name] for row in rows) for name in rows[0]}
        for ahead, rows in found.items()
    }
    for ahead, row in medians.items():
        parts = ", ".join(f"{name.removeprefix('seconds_')} {row[name]:.2f}" for name in PARTS)
        print(f"{ahead} ahead: {row['seconds']:.2f} s an episode ({parts})")
    ratio = medians[0]["seconds"] / medians[1]["seconds"]
    print(f"1 ahead is {ratio:.2f} times as fast, of {len(found[1])} episodes each")
    if args.output:
        text = json.dumps({"medians": medians, "episodes": found, "ratio": ratio}, indent=2)
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
