"""Summary of a run's metrics.jsonl: evaluation before and after, throughput, peak memory.

``python examples/demo/result.py METRICS [sft | rm | dpo | ppo]``. Exit code 1 when the run has not
learned: the evaluation loss must fall (sft), the accuracy on held-out pairs reach a bound (rm), the
implicit accuracy rise while the chosen responses stay likely (dpo), the mean reward rise (ppo).
``result.py SCORES pairs`` reads the output of score.py instead.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

REWARD_ACCURACY = 0.67  # on held-out pairs, unless --reward_accuracy says otherwise
CHOSEN_MAY_FALL = 0.05  # DPO: the largest relative drop of the log-prob of chosen responses

Evaluation = dict[str, float]
Verdict = tuple[list[str], str | None]  # lines to print, and what went wrong


def sft(before: Evaluation, after: Evaluation, steps: int) -> Verdict:
    first = before["eval/loss"]
    last = after["eval/loss"]
    line = f"Loss on held-out rows: {first:.3f} before, {last:.3f} after {steps} steps"
    return [line], None if last < first else "the evaluation loss has not fallen"


def rm(
    before: Evaluation, after: Evaluation, steps: int, least: float = REWARD_ACCURACY
) -> Verdict:
    found = after["eval/acc"]
    line = (
        f"Accuracy on {after['eval/count']:.0f} held-out pairs: {_share(before, 'acc')} before, "
        f"{_share(after, 'acc')} after {steps} steps"
    )
    return [line], None if found >= least else f"the accuracy is below {least}"


def dpo(before: Evaluation, after: Evaluation, steps: int) -> Verdict:
    lines = [
        f"Implicit accuracy on {after['eval/count']:.0f} held-out pairs: "
        f"{before['eval/accuracy']:.3f} before, {_share(after, 'accuracy')} after {steps} steps",
        *(
            f"Log-probability of {what} responses: {before[f'eval/{name}']:.2f} before, "
            f"{after[f'eval/{name}']:.2f} after"
            for what, name in (("chosen", "lp_chosen"), ("rejected", "lp_rejected"))
        ),
        f"Margin of the implicit rewards: {before['eval/margin']:.3f} before, "
        f"{after['eval/margin']:.3f} after",
    ]
    start = before["eval/lp_chosen"]
    if after["eval/accuracy_low"] <= before["eval/accuracy"]:
        return lines, "the implicit accuracy has not risen beyond chance"
    if start - after["eval/lp_chosen"] > CHOSEN_MAY_FALL * abs(start):
        return lines, "the chosen responses have become less likely"
    return lines, None


def ppo(before: Evaluation, after: Evaluation, steps: int) -> Verdict:
    first = before["eval/reward"]
    last = after["eval/reward"]
    lines = [
        f"Mean reward on held-out prompts: {first:.3f} before, {last:.3f} after {steps} episodes",
        f"KL to the initial policy: {after['eval/approx_kl']:.2f} nats per response of "
        f"{after['eval/response_length']:.1f} tokens ({before['eval/response_length']:.1f} before)",
    ]
    return lines, None if last > first else "the mean reward has not risen"


def pairs(entries: list[dict], least: float = REWARD_ACCURACY) -> Verdict:
    """The accuracy in the output of score.py, which must be above ``least``."""
    from coati.utils.statistics import wilson_interval

    right = sum(
        (row["chosen"] > row["rejected"]) + 0.5 * (row["chosen"] == row["rejected"])
        for row in entries
    )
    low, high = wilson_interval(right, len(entries))
    share = right / len(entries)
    interval = f"(95% {low:.3f} to {high:.3f})"
    line = f"Accuracy on {len(entries)} test pairs: {share:.3f} {interval}"
    return [line], None if share > least else f"the accuracy is not above {least}"


def _share(evaluation: Evaluation, name: str) -> str:
    value, low, high = (evaluation[f"eval/{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f} (95% {low:.3f} to {high:.3f})"


KINDS: dict[str, Callable[..., Verdict]] = {"sft": sft, "rm": rm, "dpo": dpo, "ppo": ppo}


def summary(entries: list[dict], kind: str = "sft", **limits: float) -> tuple[str, str | None]:
    """The lines to print, and what went wrong, if anything. Raises ValueError with fewer than two
    evaluations."""
    evaluations = [entry for entry in entries if "eval/loss" in entry or "eval/reward" in entry]
    if len(evaluations) < 2:
        raise ValueError(
            f"expected an evaluation before and one after training, found {len(evaluations)}"
        )
    steps = max(entry["step"] for entry in entries)
    lines, wrong = KINDS[kind](evaluations[0], evaluations[-1], steps, **limits)
    return "\n".join([*lines, *_speed_and_memory(entries)]), wrong


def _speed_and_memory(entries: list[dict]) -> list[str]:
    speeds = sorted(
        entry["train/tokens_per_second"] for entry in entries if "train/tokens_per_second" in entry
    )
    peaks = {
        name: value
        for entry in entries
        for name, value in entry.items()
        if name.startswith("memory/")
    }
    memory = [f"{mb:.0f} MiB ({_process(name)})" for name, mb in sorted(peaks.items())]
    speed = [f"Speed: {speeds[len(speeds) // 2]:.0f} tokens/s in the median step"] if speeds else []
    return [*speed, f"Peak memory: {', '.join(memory)}"]


def _process(name: str) -> str:
    return "process " + name.removeprefix("memory/rank_").removesuffix("_peak_mb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path)
    parser.add_argument("kind", nargs="?", choices=(*KINDS, "pairs"), default="sft")
    parser.add_argument(
        "--reward_accuracy", type=float, help="accuracy a reward model must reach; default: 0.67"
    )
    args = parser.parse_args()
    limits = {} if args.reward_accuracy is None else {"least": args.reward_accuracy}
    with open(args.metrics, encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    if args.kind == "pairs":
        lines, wrong = pairs(entries, **limits)
        text = "\n".join(lines)
    else:
        text, wrong = summary(entries, args.kind, **limits)
    print(text)
    if wrong:
        sys.exit(f"result.py: {wrong}")
