"""Names of the policy trainers' choices and what each means. Imports nothing heavy: parsers read
these tables."""

from dataclasses import dataclass

# --kl_estimator -> what it is of x = log pi(token) - log reference(token)
KL_ESTIMATORS = {
    "k1": "x: unbiased, negative for half of the tokens",
    "k2": "x^2 / 2: never negative, biased, its gradient is that of the KL divergence",
    "k3": "exp(-x) - 1 + x: never negative and unbiased (Schulman 2020)",
}
# How the terms of a global batch become one number: verl's names
LOSS_AGG_MODES = {
    "token-mean": "mean over all actions of the global batch (PPO, DAPO)",
    "seq-mean-token-mean": "mean over each response, then over responses (GRPO)",
    "seq-mean-token-sum-norm": "sum over each response divided by the longest one allowed, then "
    "mean over responses (Dr. GRPO)",
}
# --rollout_is -> which importance weight corrects for responses of older weights
ROLLOUT_IS = {
    "token": "of each token by itself: little variance, biased where its prefix is off",
    "sequence": "of the whole response: unbiased up to the cap, more variance",
    "none": "no weights",
}
# The largest weight, where --rollout_is_cap does not say
ROLLOUT_IS_CAPS = {"token": 2.0, "sequence": 3.0, "none": 1.0}

CLIPS = ("clip_eps", "clip_eps_low", "clip_eps_high")


@dataclass(frozen=True)
class Surrogate:
    """One row of :data:`POLICY_LOSSES`; its function is in :mod:`coati.models.surrogate_loss`.

    ``takes``: the flags that it has. ``clip_low``, ``clip_high``: where the user gives none; None:
    those of the advantage estimator. ``loss_agg_mode``: likewise, a name of
    :data:`LOSS_AGG_MODES`.
    """

    about: str
    takes: tuple[str, ...] = CLIPS
    clip_low: float | None = None
    clip_high: float | None = None
    loss_agg_mode: str | None = None


# --policy_loss
POLICY_LOSSES: dict[str, Surrogate] = {
    "ppo": Surrogate("clipped ratio of each token (arXiv 1707.06347)", takes=(*CLIPS, "dual_clip")),
    "gspo": Surrogate(
        "clipped ratio of the whole response, the geometric mean of its tokens' (arXiv 2507.18071)",
        clip_low=3e-4,
        clip_high=4e-4,
        loss_agg_mode="seq-mean-token-mean",
    ),
    "gspo-token": Surrogate(
        "GSPO for advantages that differ within a response",
        clip_low=3e-4,
        clip_high=4e-4,
        loss_agg_mode="seq-mean-token-mean",
    ),
    "cispo": Surrogate(
        "REINFORCE with the truncated ratio as a weight: every token keeps its gradient (arXiv "
        "2506.13585)",
        takes=("cispo_cap",),
        loss_agg_mode="token-mean",
    ),
    "sapo": Surrogate(
        "a smooth gate in place of the clip (arXiv 2511.20347)",
        takes=("sapo_tau",),
        loss_agg_mode="seq-mean-token-mean",
    ),
}
CISPO_CAP = 5.0  # ScaleRL's, arXiv 2510.13786
SAPO_TAU = (1.0, 1.05)  # of positive advantages, and of others
