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


COUNTED = tuple(f"{unit}_per_second" for unit in ("pairs", "rows", "actions"))
# Of an optimizer step; online of the updates of an episode.
UPDATE_PARTS = tuple(
    f"seconds_{part}"
    for part in ("prepare", "forward", "backward", "pipeline", "waiting", "optimizer")
)
STEP_PARTS = ("seconds_data", "seconds_sampling", *UPDATE_PARTS, "seconds_publish")
EPISODE_PARTS = ("seconds_rollout", "seconds_refill", "seconds_scoring", "seconds_update")
SCORING_PARTS = ("seconds_reward", "seconds_reference", "seconds_values")
GROUPS = (
    Group(
        "Loss",
        (
            Panel("Loss", ("loss",)),
            Panel("Perplexity", ("perplexity",)),
            Panel("Negative log-likelihood", ("nll", "teacher_nll"), "nats a token"),
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
            Panel("Temperature beta", ("beta",), noisy=False),
        ),
    ),
    Group(
        "Distillation",
        (
            Panel("Divergence from the teacher", ("divergence",), "nats a token"),
            Panel("... of the student's responses", ("on_policy_divergence",), "nats a token"),
            Panel("Rows that the student answered", ("on_policy",), "share", True),
        ),
    ),
    Group(
        "Values",
        (
            Panel("Values of actions", ("q_value", "target_q_value", "state_value"), "reward"),
            Panel("Advantages of the rows' actions", ("value_advantage",), "reward"),
            Panel("Gap of the two Q heads", ("q_gap",), "reward"),
            Panel("Losses of the heads", ("q_loss", "v_loss")),
            Panel("Conservative loss (CQL)", ("cql_loss",), "nats"),
            Panel("Policy's loss (AWAC)", ("awac_loss",), "nats"),
            Panel("Correlation of values with scores", ("value_correlation",)),
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
            Panel("Best less worst score of a prompt", ("win_margin",), "reward"),
            Panel("Pairs that are ties", ("ties",), "share", True),
            Panel("Length of the two responses", ("chosen_length", "rejected_length"), "tokens"),
            Panel("Responses not trained on", ("dropped",), "share", True),
            Panel("Groups left equal by dynamic sampling", ("refill_left",), "groups"),
            Panel("Rounds of dynamic sampling", ("refill_rounds",), "rounds"),
            Panel("Further prompts of dynamic sampling", ("refill_prompts",), "prompts"),
        ),
    ),
    Group(
        "Policy",
        (
            Panel("KL from the reference", ("approx_kl",), "nats a response"),
            Panel("KL coefficient", ("kl_coef",), noisy=False),
            Panel("Entropy of the samples", ("sampled_entropy",), "nats a token"),
            Panel("Entropy of the policy", ("policy_entropy",), "nats a token"),
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
            Panel(
                "Throughput",
                ("tokens_per_second", "supervised_tokens_per_second", "trained_tokens_per_second"),
                "tokens/s",
            ),
            Panel("Pairs, rows or actions", COUNTED, "per second"),
            Panel("Model FLOP/s", ("model_tflops_per_second",), "TFLOP/s"),
            Panel("Model FLOPs utilization (MFU)", ("mfu",), "share of the peak", True),
            Panel("Responses", ("samples_per_second",), "responses/s"),
            Panel(
                "Time of an episode",
                EPISODE_PARTS,
                "seconds",
            ),
            Panel("Time of the parts of a step", STEP_PARTS, "seconds"),
            Panel("Time of the parts of scoring", SCORING_PARTS, "seconds"),
            Panel("Peak memory of a process", ("peak_memory_mb",), "MiB", noisy=False),
        ),
    ),
)
PLACED = {stem for group in GROUPS for panel in group.panels for stem in panel.stems}
# Positions and counts: they say how others were made.
NOT_DRAWN = ("epoch", "optimizer_steps", "count", "supervised_tokens", "pairs", "rows", "actions")
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
