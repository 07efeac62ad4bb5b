"""Diagnostics of online DPO runs: those of PPO and GRPO that hold there too, with the advice that
fits, and what can be wrong with pairs."""

from coati.trainer.monitor import rl_checks
from coati.trainer.monitor.episode_history import History
from coati.trainer.monitor.rl_checks import REMEMBERED, Check, Finding, RLChecks, Settings

MOST_TIES = 0.9
LONGER = 1.3  # chosen responses to rejected ones, and responses to those of the first episodes
# What is advised for PPO and GRPO -> what does the same here.
ADVICE = {
    "Raise --kl_coef or give --kl_target": "Raise --beta",
    "raise --kl_coef or --clip_eps_high; sample with temperature 1": (
        "raise --beta or --temperature"
    ),
    "lower --kl_coef": "lower --beta",
    "raise --kl_coef": "raise --beta",
    "(--top_k, --top_p, --repetition_penalty)": (
        "(--temperature, --top_k, --top_p, --repetition_penalty)"
    ),
}


def advised(check: Check) -> Check:
    """``check`` with the advice of :data:`ADVICE`."""

    def found(history: History, settings: Settings) -> Finding | None:
        finding = check(history, settings)
        if finding is None:
            return None
        text = finding.text
        for there, here in ADVICE.items():
            text = text.replace(there, here)
        return Finding(finding.severity, text)

    return found


def mostly_ties(history: History, settings: Settings) -> Finding | None:
    """Nearly all pairs are ties, which are not trained on."""
    share = history.late("ties")
    if share is None or share <= MOST_TIES:
        return None
    return Finding(
        1.0,
        f"{share:.0%} of the pairs are ties, which are not trained on: neither response is better. "
        "Unless the task is solved: take prompts that are neither too easy nor too hard, a reward "
        "with more steps or another judge prompt, a higher --temperature, more --num_generations",
    )


def longer_and_longer(history: History, settings: Settings) -> Finding | None:
    """Chosen responses are much longer than rejected ones, and responses have become longer."""
    chosen = history.late("chosen_length")
    rejected = history.late("rejected_length")
    first = history.early("response_length")
    now = history.late("response_length")
    if chosen is None or rejected is None or first is None or now is None:
        return None
    if chosen <= LONGER * rejected or now <= LONGER * first:
        return None
    return Finding(
        now / max(first, 1.0),
        f"responses have grown from {first:.0f} to {now:.0f} tokens, and chosen ones have "
        f"{chosen:.0f} where rejected ones have {rejected:.0f}: what tells them apart may be "
        "length alone. Look at the samples; change the judge's prompt, add the reward length, or "
        "take --length_normalization or --ld_alpha",
    )


SHARED = (
    rl_checks.rollout_differs,
    rl_checks.kl_negative,
    rl_checks.kl_running_away,
    rl_checks.reward_not_rising,
    rl_checks.reward_falling,
    rl_checks.degenerate,
    rl_checks.entropy_collapse,
    rl_checks.many_cut,
)
OWN = (mostly_ties, longer_and_longer)
CHECKS = {check.__name__: advised(check) for check in SHARED} | {
    check.__name__: check for check in OWN
}


class PairChecks(RLChecks):
    """The diagnostics of a run; keywords as of
    :class:`~coati.trainer.monitor.rl_checks.RLChecks`."""

    def checks(self) -> dict[str, Check]:
        return CHECKS

    def remembered(self) -> tuple[str, ...]:
        return (*REMEMBERED, "ties", "chosen_length", "rejected_length")
