"""Names of what an experience can be made with. Imports nothing heavy: parsers read these
tables."""

from dataclasses import dataclass

# --reward_at -> which actions the score is added to
REWARD_PLACES = {
    "last": "the last action of the response alone",
    "every_token": "every action, so that long responses add it up more often: what the first "
    "implementations did",
}
# --reward_normalization
REWARD_NORMALIZATIONS = ("none", "running")


@dataclass(frozen=True)
class GroupMethod:
    """One row of the table: an advantage without a critic, from the scores of several responses to
    each prompt.

    ``group``: whether responses to one prompt are compared, which takes at least two. ``whiten``:
    whether advantages are whitened over all actions of a collect phase afterward.
    ``loss_agg_mode``: a name of :data:`~coati.models.policy_registry.LOSS_AGG_MODES`.
    ``clip_high``: its upper clip.
    ``drop_equal``: whether groups whose scores are all equal are left out.
    """

    about: str
    group: bool = True
    whiten: bool = False
    loss_agg_mode: str = "seq-mean-token-mean"
    clip_high: float = 0.2
    drop_equal: bool = False


GROUP_METHODS: dict[str, GroupMethod] = {
    "grpo": GroupMethod("(r - mean) / (std + 1e-4) of the group (arXiv 2402.03300)"),
    "dr_grpo": GroupMethod(
        "r - mean of the group, no division by std or length (arXiv 2503.20783)",
        loss_agg_mode="seq-mean-token-sum-norm",
    ),
    "rloo": GroupMethod("r - mean of the other responses of the group (arXiv 2402.14740)"),
    "reinforce_pp": GroupMethod(
        "REINFORCE++: r, whitened over all responses (arXiv 2501.03262)",
        group=False,
        whiten=True,
        loss_agg_mode="token-mean",
    ),
    "reinforce_pp_baseline": GroupMethod(
        "REINFORCE++-baseline: r - mean of the group, whitened over all responses",
        whiten=True,
        loss_agg_mode="token-mean",
    ),
    "dapo": GroupMethod(
        "as grpo, clipped at .28 above, mean over all actions, equal groups dropped (arXiv "
        "2503.14476)",
        loss_agg_mode="token-mean",
        clip_high=0.28,
        drop_equal=True,
    ),
}
