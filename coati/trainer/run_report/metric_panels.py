"""Which metrics stand together on a page, under which headings, and in which units."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TRAIN = "train/"
EVAL = "eval/"


@dataclass(frozen=True)
class Panel:
    """Metrics that share a chart, by their names without "train/" and "eval/".

    ``unit``: on the vertical axis. ``share``: values are parts of a whole, and the axis shows 0 to
    1. ``noisy``: a running mean of many values says more than the values.
    """

    title: str
    stems: tuple[str, ...]
    unit: str = ""
    share: bool = False
    noisy: bool = True


@dataclass(frozen=True)
class Group:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


GROUPS = (
    Group(
        "Loss",
        (
            Panel("Loss", ("loss",)),
            Panel("Perplexity", ("perplexity",)),
            Panel("Policy loss", ("policy_loss",)),
            Panel("Value loss", ("value_loss",)),
            Panel("Supervised loss (ptx)", ("ptx_loss",)),
        ),
    ),
    Group(
        "Preferences",
        (
            Panel("Accuracy on pairs", ("accuracy", "acc"), share=True),
            Panel("Margin (chosen - rejected)", ("margin", "dist"), "reward"),
            Panel("Rewards of the two responses", ("chosen_rewards", "rejected_rewards"), "reward"),
            Panel("Scores of the two responses", ("reward_chosen", "reward_rejected"), "score"),
            Panel("Log-probs of the two responses", ("lp_chosen", "lp_rejected"), "nats"),
            Panel("Log odds ratio", ("log_odds_ratio",), "nats"),
            Panel("Baseline z (KL)", ("kl",), "nats"),
        ),
    ),
    Group(
        "Rewards and responses",
        (
            Panel("Reward", ("reward",)),
            Panel("Spread of the scores", ("reward_std",), "standard deviation"),
            Panel("Response length", ("response_length",), "tokens"),
            Panel("Responses that end by themselves", ("stop_rate",), "share", True),
            Panel("Empty responses", ("empty_responses",), "share", True),
            Panel("Different bigrams", ("distinct_2",), "share", True),
            Panel("Groups with equal scores", ("equal_groups",), "share", True),
            Panel("Responses not trained on", ("dropped",), "share", True),
        ),
    ),
    Group(
        "Policy",
        (
            Panel("KL from the reference", ("approx_kl",), "nats a response"),
            Panel("KL coefficient", ("kl_coef",), noisy=False),
            Panel("Entropy of the samples", ("sampled_entropy",), "nats a token"),
            Panel("KL of an update", ("update_kl",), "nats a token"),
            Panel("Clipped tokens", ("clip_fraction", "value_clip_fraction"), "share"),
            Panel("Largest ratio", ("ratio_max",), "new / old probability"),
            Panel("Skipped steps", ("skip_ratio",), "share", True),
            Panel("Sampling against training", ("rollout_gap", "staleness_gap"), "nats a token"),
            Panel("Largest gap", ("rollout_gap_max",), "nats"),
            Panel("Age of the responses", ("staleness",), "optimizer steps"),
            Panel("Effective sample size", ("rollout_is_ess",), "share", True),
            Panel(
                "Weights at the cap", ("rollout_is_truncated", "rollout_is_masked"), "share", True
            ),
            Panel("Advantages", ("advantages_mean", "advantages_std")),
            Panel("Explained variance of the critic", ("explained_variance",)),
        ),
    ),
    Group(
        "Optimization and speed",
        (
            Panel("Learning rate", ("lr", "lr_actor", "lr_critic"), noisy=False),
            Panel("Gradient norm", ("grad_norm", "critic_grad_norm")),
            Panel("Throughput", ("tokens_per_second",), "tokens/s"),
            Panel("Responses", ("samples_per_second",), "responses/s"),
            Panel(
                "Time of an episode",
                ("seconds_rollout", "seconds_scoring", "seconds_update"),
                "seconds",
            ),
        ),
    ),
)
PLACED = {stem for group in GROUPS for panel in group.panels for stem in panel.stems}
# Positions and counts: they say how others were made.
NOT_DRAWN = ("epoch", "optimizer_steps", "count", "supervised_tokens", "pairs", "rows")
BOUNDS = ("_low", "_high")  # of the metric without the ending
MEMORY = "memory/"


def stem_of(name: str) -> str:
    """``name`` without the part before the first "/", where that is train or eval."""
    return name.removeprefix(TRAIN).removeprefix(EVAL)


def drawn(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are curves of their own."""
    held = set(names)
    return [
        name
        for name in names
        if stem_of(name) not in NOT_DRAWN
        and not name.startswith(MEMORY)
        and not any(name.endswith(end) and name.removesuffix(end) in held for end in BOUNDS)
    ]


def panels_of(names: Iterable[str]) -> dict[str, list[tuple[Panel, list[str]]]]:
    """Heading -> ``(panel, its metrics among names)``, without what is empty; metrics that no panel
    names come last, one panel each."""
    found: dict[str, list[tuple[Panel, list[str]]]] = {}
    shown = drawn(list(names))
    by_stem: dict[str, list[str]] = {}
    for name in shown:
        by_stem.setdefault(stem_of(name), []).append(name)
    for group in GROUPS:
        for panel in group.panels:
            mine = [name for stem in panel.stems for name in sorted_sides(by_stem, stem)]
            if mine:
                found.setdefault(group.title, []).append((panel, mine))
    parts = sorted(stem for stem in by_stem if stem.startswith("reward/"))
    if parts:
        panel = Panel("Reward by source", tuple(parts), "reward")
        names_of_parts = [name for stem in parts for name in sorted_sides(by_stem, stem)]
        found.setdefault("Rewards and responses", []).insert(1, (panel, names_of_parts))
    for stem in sorted(set(by_stem) - PLACED - set(parts)):
        found.setdefault("Other metrics", []).append(
            (Panel(stem, (stem,)), sorted_sides(by_stem, stem))
        )
    order = [group.title for group in GROUPS] + ["Other metrics"]
    return {title: found[title] for title in order if title in found}


def sorted_sides(by_stem: Mapping[str, list[str]], stem: str) -> list[str]:
    """The metrics of ``stem``, training before evaluation."""
    return sorted(by_stem.get(stem, []), key=lambda name: name.startswith(EVAL))


def label_of(name: str) -> str:
    """A metric as a legend names it."""
    what = stem_of(name).removeprefix("reward/").replace("_", " ")
    sides = {TRAIN: "training", EVAL: "evaluation"}
    side = next((text for prefix, text in sides.items() if name.startswith(prefix)), None)
    return f"{what}, {side}" if side else what
