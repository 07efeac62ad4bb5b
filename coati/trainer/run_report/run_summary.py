"""What the files of a run say in a few words: its method, status, best evaluation, times, samples,
settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from coati.trainer.monitor.sample_table import own_parts
from coati.trainer.run_report.metric_panels import (
    EPISODE_PARTS,
    EVAL,
    MEMORY,
    SCORING_PARTS,
    STEP_PARTS,
    TRAIN,
    UPDATE_PARTS,
)
from coati.trainer.run_report.run_files import RunFiles
from coati.trainer.schedule import is_better

METHODS = {
    "sft": "supervised fine-tuning (SFT)",
    "pretrain": "continued pre-training",
    "rm": "reward model",
    "dpo": "direct preference optimization (DPO)",
    "orpo": "odds-ratio preference optimization (ORPO)",
    "kto": "Kahneman-Tversky optimization (KTO)",
    "gkd": "generalized knowledge distillation (GKD)",
    "ilql": "implicit language Q-learning (ILQL)",
    "ppo": "proximal policy optimization (PPO)",
    "grpo": "group relative policy optimization (GRPO)",
    "online_dpo": "online direct preference optimization (online DPO)",
}
SHORT = {  # the others in capitals
    "pretrain": "Pre-training",
    "sft": "SFT",
    "rm": "Reward model",
    "online_dpo": "Online DPO",
}
# Metrics and flags that tell the method of a run that recorded no events.
TELLING_METRICS = {
    "train/value_loss": "ppo",
    "train/ties": "online_dpo",
    "train/policy_loss": "grpo",
    "train/acc": "rm",
}
TELLING_FLAGS = {
    "loss_type": "dpo",
    "desirable_weight": "kto",
    "lam": "orpo",
    "gkd_beta": "gkd",
    "cql_coef": "ilql",
    "dataset": "sft",
}
# Of the evaluation metrics, the first that is there counts where --metric_for_best names none.
MAIN = ("reward", "accuracy", "acc", "loss")
DATA = ("dataset", "prompt_dataset", "ptx_dataset")
SHOWN_PAIRS = 6
SHOWN_SAMPLES = 6
LONGEST_TEXT = 4000  # characters of a shown prompt or response


@dataclass(frozen=True)
class Status:
    """Where a run stands. ``kind``: "running", "finished", "stopped", "failed" or "unknown"."""

    kind: str
    text: str
    reason: str = ""


@dataclass(frozen=True)
class Evaluation:
    """A metric of the evaluations: its first, last and best values and where they were measured."""

    name: str
    first: tuple[float, float]
    last: tuple[float, float]
    best: tuple[float, float] | None
    lower_is_better: bool


@dataclass
class Sessions:
    """The time of a run, resumed ones included: ``seconds`` of each phase, ``elapsed`` in all."""

    seconds: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0

    def parts(self) -> list[tuple[str, float]]:
        """Phases and the rest, in seconds."""
        rest = self.elapsed - sum(self.seconds.values())
        return [*self.seconds.items(), *([("other", rest)] if rest > 0.05 else [])]


def method_of(run: RunFiles) -> str:
    """ "sft", "dpo", ...; "" where nothing tells."""
    for event in reversed(run.events):
        if event.get("method"):
            return str(event["method"])
    told = [name for metric, name in TELLING_METRICS.items() if metric in run.metrics]
    told += [name for flag, name in TELLING_FLAGS.items() if flag in run.arguments]
    return told[0] if told else ""


def short_method(run: RunFiles) -> str:
    """The method as a heading names it."""
    method = method_of(run)
    return SHORT.get(method, method.upper()) or "Training run"


def model_of(run: RunFiles) -> str:
    """The last part of --pretrain."""
    named = run.arguments.get("pretrain")
    return Path(str(named)).name if named else "a model"


def data_of(run: RunFiles) -> list[str]:
    """The paths of the rows that are trained on."""
    return [
        str(path)
        for flag in DATA
        if isinstance(run.arguments.get(flag), list)
        for path in run.arguments[flag]
    ]


def unit_of(run: RunFiles) -> str:
    """What the steps of metrics.jsonl count."""
    for event in run.events:
        if event.get("unit"):
            return str(event["unit"])
    return "episode" if "train/policy_loss" in run.metrics else "step"


def total_of(run: RunFiles) -> int | None:
    """The steps (or episodes) that the run is to have."""
    totals = [event["total"] for event in run.events if event.get("total")]
    return totals[-1] if totals else None


def status_of(run: RunFiles, live: bool = False) -> Status:
    """``live``: the run itself asks."""
    unit = unit_of(run)
    told = [event for event in run.events if event.get("event") in KINDS]
    if not told:
        done = any((run.folder / name).is_dir() for name in ("modeling", "actor/modeling"))
        if done:
            return Status("finished", "finished", "its final model is there")
        return Status(
            "unknown", "no end recorded", "a run of an earlier release: it may have ended"
        )
    last = told[-1]
    step = f"{last.get('step') or 0:,}"
    kind = KINDS[last["event"]]
    reason = str(last.get("text", ""))
    if kind != "running":
        where = {"finished": f"after {unit} {step}", "stopped": f"after {unit} {step}"}
        return Status(kind, f"{kind} {where.get(kind, f'at {unit} {step}')}", reason)
    total = total_of(run)
    at = f"{unit} {run.last_step:,.0f}" + (f" of {total:,}" if total else "")
    if live:
        return Status("running", f"running, {at}", "this page is written anew at each evaluation")
    return Status(
        "unknown",
        f"no end recorded, {at}",
        "the run goes on, or was killed; its metrics were last written at "
        f"{local(run.written_at())}",
    )


KINDS = {
    "started": "running",
    "resumed": "running",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
}


def resumed_at(run: RunFiles) -> list[float]:
    """The steps at which the run was resumed."""
    return [event.get("step", 0) for event in run.events if event.get("event") == "resumed"]


def began_at(run: RunFiles) -> str | None:
    """When the run was started."""
    times = [event["time"] for event in run.events if event.get("event") == "started"]
    return times[0] if times else None


def warnings_of(run: RunFiles) -> list[tuple[str, str]]:
    """``(where, text)`` of what the run was warned of, each text once."""
    unit = unit_of(run)
    found: dict[str, str] = {}
    for event in run.events:
        if event.get("event") == "warning":
            text = str(event.get("text", "")).removeprefix("warning: ")
            step = event.get("step", 0)
            found.setdefault(text, f"{unit} {step:,}" if step else "at the start")
    return [(where, text) for text, where in found.items()]


def notes_of(run: RunFiles) -> list[str]:
    """What the run said at its end, a reward model's verdict above all; of a resumed one, at its
    last."""
    notes: list[str] = []
    for event in run.events:
        if event.get("event") in ("started", "resumed"):
            notes = []
        elif event.get("event") == "note":
            notes.append(str(event.get("text", "")))
    return notes


def times_of(run: RunFiles) -> Sessions:
    """Of every session the time that it had recorded last."""
    total = Sessions()
    latest: dict[str, Any] | None = None
    for event in [*run.events, {"event": "started"}]:
        if event.get("event") == "times":
            latest = event
        elif event.get("event") in ("started", "resumed") and latest is not None:
            total.elapsed += latest.get("elapsed", 0.0)
            for name, seconds in latest.get("seconds", {}).items():
                total.seconds[name] = total.seconds.get(name, 0.0) + seconds
            latest = None
    return total


def evaluations_of(run: RunFiles) -> list[Evaluation]:
    """The metrics of the evaluations, the one that counts first."""
    names = [name for name in run.metrics if name.startswith(EVAL)]
    names = [name for name in names if not name.endswith(("_low", "_high", "/count"))]
    main = main_metric(run, names)
    return [_evaluation(run, name) for name in sorted(names, key=lambda name: name != main)]


def main_metric(run: RunFiles, names: list[str]) -> str | None:
    """--metric_for_best, or what is usual."""
    wanted = run.arguments.get("metric_for_best")
    candidates = [wanted, f"{EVAL}{wanted}"] if wanted else [EVAL + name for name in MAIN]
    return next((name for name in candidates if name in names), None)


def _evaluation(run: RunFiles, name: str) -> Evaluation:
    series = run.metrics[name]
    points = list(zip(series.steps, series.values, strict=True))
    best: tuple[float, float] | None = None
    for step, value in points:
        if is_better(name, value, None if best is None else best[1]):
            best = (step, value)
    return Evaluation(name, points[0], points[-1], best, is_better(name, 0.0, 1.0))


def memory_of(run: RunFiles) -> dict[str, float]:
    """Rank -> its peak memory in MiB."""
    ends = (MEMORY + "rank_", "_peak_mb")
    return {
        name.removeprefix(ends[0]).removesuffix(ends[1]): series.last
        for name, series in run.metrics.items()
        if name.startswith(ends[0]) and name.endswith(ends[1])
    }


def parts_of(run: RunFiles) -> dict[str, float]:
    """The parts of a step, or an episode, and their seconds in the mean of what was logged; of an
    episode behind each part those that it is made of."""
    episodes = f"{TRAIN}seconds_rollout" in run.metrics
    names = dict.fromkeys(STEP_PARTS, "")
    if episodes:
        inside = {"seconds_scoring": SCORING_PARTS, "seconds_update": UPDATE_PARTS}
        names = {}
        for whole in EPISODE_PARTS:
            parts = dict.fromkeys(inside.get(whole, ()), f"{_label(whole)}: ")
            names |= {whole: ""} | parts
        names |= {"seconds_publish": ""}
    return {
        before + _label(name): sum(series.values) / len(series.values)
        for name, before in names.items()
        if (series := run.metrics.get(TRAIN + name))
    }


def _label(name: str) -> str:
    return name.removeprefix("seconds_").replace("_", " ")


@dataclass(frozen=True)
class ShownSample:
    """A response at a step, with its numbers by name."""

    step: int
    response: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and responses to it, the earliest and the latest where there are two."""

    prompt: str
    samples: list[ShownSample]


def samples_of(run: RunFiles) -> tuple[list[ShownPrompt], list[ShownPrompt]]:
    """Prompts that were answered at several steps (before and after), and the latest others."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    prompts = own_parts([str(row.get("prompt", "")) for row in run.samples])
    for prompt, row in zip(prompts, run.samples, strict=True):
        by_prompt.setdefault(prompt, []).append(row)
    pairs = []
    others = []
    for prompt, rows in by_prompt.items():
        first = rows[0]
        last = rows[-1]
        if first.get("step") != last.get("step"):
            pairs.append(ShownPrompt(_cut(prompt), [_shown(first), _shown(last)]))
        else:
            others.append(ShownPrompt(_cut(prompt), [_shown(first)]))
    return pairs[:SHOWN_PAIRS], others[-SHOWN_SAMPLES:]


def _shown(row: dict[str, Any]) -> ShownSample:
    numbers = {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
    return ShownSample(int(row.get("step", 0)), _cut(str(row.get("response", ""))), numbers)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."


def settings_of(run: RunFiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that were not left at their defaults, and the others; all are among the others
    where the run did not record which were given."""
    given = run.environment.get("flags_given", [])
    flags = dict(sorted(run.arguments.items()))
    changed = {name: value for name, value in flags.items() if name in given}
    return changed, {name: value for name, value in flags.items() if name not in changed}


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min"


def local(time: str | None) -> str:
    """An event's time without its "T" and "Z", said to be UTC."""
    if not time:
        return "not recorded"
    return datetime.fromisoformat(time.replace("Z", "+00:00")).strftime("%Y-%m-%d %H:%M:%S UTC")


def versions(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Package and version, coati and Python first."""
    known = run.environment
    if known.get("coati"):
        commit = f" (commit {known['commit']})" if known.get("commit") else ""
        yield "coati", f"{known['coati']}{commit}"
    if known.get("python"):
        yield "Python", str(known["python"])
    if known.get("cuda"):
        yield "CUDA", str(known["cuda"])
    yield from (known.get("packages") or {}).items()
