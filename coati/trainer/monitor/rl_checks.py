"""Diagnostics of PPO and GRPO runs: what is wrong, the likely cause, and the flag to change.

Each check is a function of the history. Its finding is reported once, and again when it has become
three times as severe. Thresholds are far from what healthy runs reach, to avoid false alarms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from coati.trainer.monitor.episode_history import History

REPEAT_FACTOR = 3.0  # a finding is repeated when its severity has grown by this factor


@dataclass(frozen=True)
class Settings:
    """The flags that the advice depends on, and how long the checks wait.

    ``window``: episodes to average over; ``patience``: episodes by which the reward should have
    risen. ``fp32``: models are trained in fp32. The others are the flags of the same names
    (``max_new_tokens``: --max_seq_len).
    """

    window: int = 10
    patience: int = 50
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    ptx_coef: float = 0.0
    kl_target: float | None = None
    reward_clip: float | None = 5.0
    reward_normalization: str = "none"
    max_new_tokens: int | None = None
    rollouts_ahead: int = 0
    rollout_is: str = "token"
    fp32: bool = False


class Finding(NamedTuple):
    """``severity`` is only compared with earlier findings of the same check."""

    severity: float
    text: str


Check = Callable[[History, Settings], Finding | None]


class RLChecks:
    """The diagnostics of a run. Keywords: the fields of :class:`Settings`.

    Raises:
        TypeError: for an unknown keyword.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self._history = History(self.remembered(), self.settings.window)
        self._reported: dict[str, float] = {}  # check -> severity

    def checks(self) -> dict[str, Check]:
        """The checks by name, in the order in which they report."""
        return CHECKS

    def remembered(self) -> tuple[str, ...]:
        """The metrics that they read."""
        return REMEMBERED

    def check(self, metrics: dict[str, float], episode: int) -> list[str]:
        """New findings after ``episode``; the names of ``metrics`` are without "train/"."""
        self._history.add(_usable(metrics, self._history), episode)
        found = []
        for name, check in self.checks().items():
            finding = check(self._history, self.settings)
            if finding is None or finding.severity < REPEAT_FACTOR * self._reported.get(
                name, -math.inf
            ):
                continue
            self._reported[name] = finding.severity
            found.append(f"warning: {finding.text}")
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON."""
        return {"history": self._history.state_dict(), "said": dict(self._reported)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave: a resumed run reports what an uninterrupted one
        would."""
        self._history.load_state_dict(state["history"])
        self._reported = dict(state["said"])


def _usable(metrics: dict[str, float], history: History) -> dict[str, float]:
    """``metrics``, without the explained variance if scores hardly vary any more: it is then
    meaningless."""
    spread = metrics.get("reward_std")
    usual = history.early("reward_std")
    if spread is not None and usual is not None and spread < 0.1 * usual:
        return {name: value for name, value in metrics.items() if name != "explained_variance"}
    return metrics


def reward_not_rising(history: History, settings: Settings) -> Finding | None:
    """Neither the linear trend nor the last window shows a significant rise of the reward, and a
    rise of 0.3 standard deviations would have been significant."""
    start = history.early("reward")
    end = history.late("reward")
    spread = history.late("reward_std")
    if (
        history.counts["reward"] < 2 * settings.window
        or history.reward.span + 1 < settings.patience
        or spread == 0
    ):
        return None
    rise, error = history.reward.rise()
    noise = history.noise("reward")
    # Some runs learn within a few episodes.
    opening = sum(history.first["reward"][:3]) / 3
    window = settings.window
    shift = max(
        (end - start) / math.sqrt(2 / window), (end - opening) / math.sqrt(1 / 3 + 1 / window)
    )
    if rise > 2 * error or shift > 2.5 * noise:
        return None
    if spread is not None and rise + 2 * error > 0.3 * spread:
        return None
    episodes = int(history.reward.span) + 1
    fallen = max(start - end, 0.0)
    text = f"the reward has not risen in {episodes} episodes ({start:.3g} to {end:.3g})"
    return Finding(1 + fallen / spread if spread else 1.0, f"{text}. {_why_flat(history)}")


def _why_flat(history: History) -> str:
    spread, kl, coefficient = (
        history.late(name) for name in ("reward_std", "approx_kl", "kl_coef")
    )
    facts = []
    cause = "first look at the spread of the reward's scores, then raise --lr or lower --kl_coef"
    if spread is not None:
        facts.append(f"the scores' spread is {spread:.3g}")
    if kl is not None and coefficient:  # without a coefficient there is no reference, and KL is 0
        facts.append(f"the KL penalty {coefficient * kl:.3g}")
        if spread is not None and coefficient * kl > spread:
            cause = "the penalty outweighs what the scores could give: lower --kl_coef"
        elif kl < 0.01:
            cause = (
                f"the policy has hardly moved (KL {kl:.2g}): raise --lr; and look at the spread of "
                "the scores"
            )
    return f"{' and '.join(facts)}; {cause}".removeprefix("; ")


def reward_falling(history: History, settings: Settings) -> Finding | None:
    """More than half of the reward's gain is lost again, and significantly so."""
    start = history.early("reward")
    end = history.late("reward")
    best = history.best
    if history.counts["reward"] < 3 * settings.window:
        return None
    lost = best - end
    gained = best - start
    chance = 5 * history.noise("reward") * math.sqrt(2 / settings.window)
    if lost < 0.5 * gained or lost <= chance or gained <= chance:
        return None
    return Finding(
        lost,
        f"the reward had risen from {start:.3g} to {best:.3g} and has fallen to {end:.3g}: lower "
        "--lr or --num_update_steps, and go on from a checkpoint before the fall",
    )


def degenerate(history: History, settings: Settings) -> Finding | None:
    """distinct_2 far below its initial value: responses repeat themselves or each other."""
    fall = _fall(history, "distinct_2")
    if fall is None or fall.now > 0.6 * fall.then or fall.then - fall.now < 0.1:
        return None
    ptx = (
        "raise --ptx_coef (below 1)"
        if settings.ptx_coef
        else "mix in text with --ptx_coef between 0 and 1"
    )
    return Finding(
        fall.then / max(fall.now, 1e-6),
        f"responses repeat themselves or each other: distinct_2 fell from {fall.then:.2f} to "
        f"{fall.now:.2f}. {ptx[0].upper()}{ptx[1:]} and --ptx_dataset, raise --kl_coef, or stop "
        "after fewer episodes; look at the samples",
    )


def entropy_collapse(history: History, settings: Settings) -> Finding | None:
    """The entropy has collapsed, so there is no exploration."""
    fall = _fall(history, "sampled_entropy")
    if fall is None or fall.then <= 0 or fall.now > 0.2 * fall.then:
        return None
    return Finding(
        fall.then / max(fall.now, 1e-6),
        f"the entropy fell from {fall.then:.3g} to {fall.now:.3g} nats per token: responses to a "
        "prompt are nearly always the same, so there is no exploration. Lower --lr or "
        "--num_update_steps, raise --kl_coef or --clip_eps_high; sample with temperature 1",
    )


class Fall(NamedTuple):
    """Means of a metric's first and last window."""

    then: float
    now: float


def _fall(history: History, name: str) -> Fall | None:
    """The first and the last window, once they do not overlap."""
    if history.counts[name] < 2 * history.window:
        return None
    return Fall(history.early(name), history.late(name))


def kl_negative(history: History, settings: Settings) -> Finding | None:
    """The mean KL is significantly below 0, which is impossible for samples of the policy."""
    kl = history.late("approx_kl")
    length = history.late("response_length") or 0.0
    if kl is None or kl > -max(0.1, 0.001 * length):
        return None
    if kl + 3 * history.noise("approx_kl") / math.sqrt(settings.window) > 0:
        return None
    off = {"top_k": (None, 0), "top_p": (1.0,), "repetition_penalty": (1.0,)}
    changed = [
        f"--{name} {getattr(settings, name)}"
        for name, plain in off.items()
        if getattr(settings, name) not in plain
    ]
    if changed:
        cause = (
            "responses are not sampled from the policy itself but with "
            f"{' and '.join(changed)}: switch that off"
        )
    else:
        cause = (
            "look for what changes the distribution that is sampled from (--top_k, --top_p, "
            "--repetition_penalty), and at rollout_gap"
        )
    return Finding(
        -kl, f"the KL toward the reference is negative ({kl:.3g} nats per response): {cause}"
    )


def kl_running_away(history: History, settings: Settings) -> Finding | None:
    """The KL exceeds its bound (3 x --kl_target, else 10 nats + 0.1 per token) and is still rising,
    or exceeds it threefold."""
    kl = history.late("approx_kl")
    earlier = history.before("approx_kl")
    length = history.late("response_length")
    if kl is None:
        return None
    bound = 3 * settings.kl_target if settings.kl_target else 10 + 0.1 * (length or 0.0)
    rising = earlier is not None and kl > 1.1 * earlier
    if kl < bound or not (rising or kl > 3 * bound):
        return None
    return Finding(
        kl,
        f"the KL to the reference is diverging: {kl:.3g} nats per response, above {bound:.3g}. "
        "Raise --kl_coef or give --kl_target, lower --lr or --num_update_steps; a rising reward "
        "may be reward hacking, so look at the samples",
    )


def all_equal(history: History, settings: Settings) -> Finding | None:
    """All responses score alike, so advantages are 0."""
    share, spread, reward = (
        history.late(name) for name in ("equal_groups", "reward_std", "reward")
    )
    if share is not None and share > 0.9:
        what = f"in {share:.0%} of the groups all responses score alike"
    elif spread is not None and reward is not None and spread <= 1e-6 * max(abs(reward), 1.0):
        what = "all responses score alike"
    else:
        return None
    return Finding(
        1.0,
        f"{what} (reward {reward or 0.0:.3g}), so nothing is learned from them. Unless the task is "
        "solved: take prompts that are neither too easy nor too hard, a reward with more steps, a "
        "higher temperature, more --num_generations",
    )


def not_centered(history: History, settings: Settings) -> Finding | None:
    """With a critic: scores are many standard deviations from 0, or so far that clipping makes
    them equal."""
    if settings.reward_normalization != "none" or not history.counts["value_loss"]:
        return None
    now = history.late("reward")
    spread = history.late("reward_std")
    if (
        now is not None
        and spread is not None
        and settings.reward_clip
        and abs(now) - spread > settings.reward_clip
    ):
        return Finding(
            2.0,
            f"most scores (mean {now:.3g}) are beyond --reward_clip {settings.reward_clip:g} and "
            "are cut to the same number: raise it, take --reward_normalization running, or train "
            "the reward model with --center_coef 0.01",
        )
    start = history.early("reward")
    first_spread = history.early("reward_std")
    if start is None or first_spread is None or abs(start) <= 5 * first_spread or first_spread == 0:
        return None
    return Finding(
        1.0,
        f"the reward is not centered: mean {start:.3g} with a spread of {first_spread:.3g}. The "
        "critic must learn that distance first: train the reward model with --center_coef 0.01, or "
        "take --reward_normalization running",
    )


def many_cut(history: History, settings: Settings) -> Finding | None:
    """More than a fifth of the responses are truncated at the length limit."""
    rate = history.late("stop_rate")
    if rate is None or rate > 0.8:
        return None
    room = f" {settings.max_new_tokens}" if settings.max_new_tokens else ""
    return Finding(
        1 - rate,
        f"{1 - rate:.0%} of the responses are truncated at the length limit "
        f"(--max_seq_len{room}): raise it and --max_length, or take --missing_eos_penalty 1; a "
        "model that never ends its responses needs SFT first",
    )


def critic_useless(history: History, settings: Settings) -> Finding | None:
    """After the first window, the explained variance of the values is significantly below 0 over
    two windows."""
    middle = history.middle("explained_variance", 2 * settings.window)
    if middle is None or history.counts["explained_variance"] < 3 * settings.window:
        return None
    if middle + 2.5 * history.noise("explained_variance") / math.sqrt(2 * settings.window) > 0:
        return None
    return Finding(
        1.0,
        f"the explained variance has long been below 0 (median {middle:.2f}): the critic is "
        "worse than a constant. Start it from the reward model (--critic_pretrain), change "
        "--critic_lr, or take more --num_update_steps",
    )


def rollout_differs(history: History, settings: Settings) -> Finding | None:
    """Log-probs of rollout and policy differ by more than their precision explains, although both
    are of the same weights."""
    # Of responses that are asked for ahead, those of the first episode alone are of such weights.
    gap = history.middle("rollout_gap", 1 if settings.rollouts_ahead else 3)
    if gap is None or gap < (0.02 if settings.fp32 else 0.1):
        return None
    return Finding(
        gap,
        "rollout and training log-probs of the same tokens disagree (mean difference "
        f"{gap:.2g}), although both are of the same weights: a fault, no staleness. Look for "
        "another temperature, tokenizer or template, for other weights, and for another precision "
        "in the rollout engine; take --mixed_precision bf16 or fp32 instead of fp16, and compare "
        "with --rollout_engine model",
    )


def gap_unexplained(history: History, settings: Settings) -> Finding | None:
    """Older responses are further from the policy than its updates have moved it since.

    A mean absolute log-ratio is at most about sqrt(2 KL) for a move of that KL. ``update_kl`` is a
    mean over an update that it grows in, about quadratically, so that a whole one has 3 times that.
    """
    gap = history.middle("staleness_gap", 5)
    moved = history.middle("update_kl", 5)
    if gap is None or moved is None:
        return None
    explained = max(settings.rollouts_ahead, 1) * math.sqrt(6 * max(moved, 0.0))
    if gap < 3 * explained + 0.1:
        return None
    return Finding(
        gap,
        f"the log-probs of older responses differ from the policy's by {gap:.2g} a token, and "
        f"{settings.rollouts_ahead} episodes of updates explain about {explained:.2g}: a fault, no "
        "staleness. Look for another temperature, tokenizer or template in the rollout engine, and "
        "whether published weights arrive there",
    )


def rollouts_too_old(history: History, settings: Settings) -> Finding | None:
    """Importance weights leave less than half of the responses' worth; or without weights, ratios
    are off by a third."""
    less = "lower --rollouts_ahead, --lr or --num_update_steps"
    if settings.rollout_is == "none":
        gap = history.middle("staleness_gap", 3)
        if gap is None or gap < 0.3:
            return None
        return Finding(
            gap,
            f"responses are of older weights, {gap:.2g} a token away from the policy, and "
            f"--rollout_is none does not correct for it: take --rollout_is token, or {less}",
        )
    size = history.middle("rollout_is_ess", 3)
    if size is None or size > 0.5:
        return None
    return Finding(
        1 / max(size, 1e-6),
        "responses are too old for the policy: by their importance weights they are worth "
        f"{size:.0%} of as many of its own (rollout_is_ess). {less[0].upper()}{less[1:]}",
    )


def steps_skipped(history: History, settings: Settings) -> Finding | None:
    """Any policy step of the last episode was skipped."""
    last = history.recent["skip_ratio"][-1:] or [0.0]
    if last[0] <= 0:
        return None
    return Finding(
        last[0],
        f"{last[0]:.0%} of an episode's policy steps were skipped, since the mean ratio had gone "
        "beyond --skip_threshold: updates are far too large. Lower --lr or --num_update_steps",
    )


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        steps_skipped,
        rollout_differs,
        gap_unexplained,
        rollouts_too_old,
        kl_negative,
        kl_running_away,
        not_centered,
        all_equal,
        reward_not_rising,
        reward_falling,
        degenerate,
        entropy_collapse,
        many_cut,
        critic_useless,
    )
}
REMEMBERED = (
    "reward",
    "reward_std",
    "approx_kl",
    "kl_coef",
    "response_length",
    "distinct_2",
    "sampled_entropy",
    "equal_groups",
    "value_loss",
    "stop_rate",
    "explained_variance",
    "rollout_gap",
    "staleness_gap",
    "rollout_is_ess",
    "update_kl",
    "skip_ratio",
)
