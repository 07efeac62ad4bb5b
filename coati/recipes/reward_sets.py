"""The reward functions of a run with rollouts, those of its sources, which rows they need, and
which responses count as right."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from coati.cli.online_settings import OnlineSettings
from coati.dataset.load.loader import preparation_of
from coati.dataset.types.prompt_rows import DIALOGUE, UNREWARDED
from coati.experience_maker.rollout_batch import RolloutBatch
from coati.recipes.run import PreparedRows, Run
from coati.rewards.registry import REWARDS
from coati.rewards.scorer import Rewards
from coati.rewards.source_rewards import SourceRewards
from coati.rewards.source_sets import parse_source_rewards
from coati.trainer.rl_evaluation import PassAt
from coati.utils.logging import get_logger

logger = get_logger(__name__)

RewardFunctions = Rewards | SourceRewards


def reward_functions(run: Run[OnlineSettings]) -> RewardFunctions | None:
    """The functions of ``--reward_functions`` and ``--source_rewards``; with the latter prompts are
    prepared with their sources from here on."""
    reward = run.settings.reward
    everywhere = _rewards(run, reward.reward_functions, reward.reward_weights or None)
    if not reward.source_rewards:
        return everywhere
    sets = {}
    for source, found in parse_source_rewards(reward.source_rewards).items():
        sets[source] = _rewards(run, found.names, found.weights)
    if run.template is not None:
        options = replace(run.template.options, for_sources=json.dumps(sorted(sets)))
        run.template.options = options
    return SourceRewards({name: one for name, one in sets.items() if one}, everywhere)


def _rewards(
    run: Run[OnlineSettings], names: list[str], weights: list[float] | None
) -> Rewards | None:
    if not names:
        return None
    settings = run.settings
    return Rewards(
        names,
        weights,
        None if run.template is None else run.template.response_format_tags,
        settings.reward.reward_timeout or None,
        run.extras.rewards,
        settings.slow_rewards.options(names),
    )


def check_rewarded(
    prompts: PreparedRows | None, rewards: RewardFunctions | None, flag: str = "prompt_dataset"
) -> None:
    """Raise ValueError for ``prompts`` from a source without rewards, and for those without the
    ground truths that a function compares with."""
    if prompts is None or rewards is None:
        return
    if isinstance(rewards, SourceRewards):
        _check_sources(prompts, rewards, flag)
    _check_gt_answers(prompts, rewards, flag)


def _check_sources(prompts: PreparedRows, rewards: SourceRewards, flag: str) -> None:
    remedy = (
        "name rewards for it in --source_rewards (or for all others, with *=NAME), or leave those "
        "rows out"
    )
    for folder in prompts.folders:
        report = (preparation_of(folder) or {}).get("report") or {}
        if found := report.get("dropped", {}).get(UNREWARDED):
            first = "; ".join(found["first"])
            raise ValueError(
                f"--{flag}: {found['rows']} rows come from where no reward is named for: {first}; "
                f"{remedy}"
            )
    for row, source in enumerate(_sources(prompts)):
        if not rewards.knows(source):
            what = "has no source" if source is None else f"is of source {source!r}"
            raise ValueError(
                f"--{flag}: row {row} {what}, and no reward is named for that; {remedy}. Of rows "
                "that are prepared it is the category (coati prepare --columns category=source ...)"
            )


def _sources(prompts: PreparedRows) -> list[str | None]:
    rows = prompts.rows
    named = "seq_category" in rows.column_names
    return list(rows["seq_category"]) if named else [None] * len(rows)


def _check_gt_answers(prompts: PreparedRows, rewards: RewardFunctions, flag: str) -> None:
    rows = prompts.rows
    needed = [rewards.needs_gt_answer] * len(rows)
    if isinstance(rewards, SourceRewards):
        needed = [rewards.needs_gt_answer_of(source) for source in _sources(prompts)]
    if not any(needed):
        return
    wanting = ", ".join(rewards.weights)
    if "gt_answer" not in rows.column_names:
        raise ValueError(
            f"--{flag} has no gt_answer, which --reward_functions {wanting} compares responses "
            "with; prepare the "
            "prompts from rows that have one, or choose other functions"
        )
    answers = zip(rows["gt_answer"], needed, strict=True)
    without = [row for row, (answer, need) in enumerate(answers) if need and answer is None]
    if without:
        raise ValueError(
            f"--{flag}: {len(without)} of {len(rows)} prompts have no gt_answer (the first: row "
            f"{without[0]}), which "
            f"--reward_functions {wanting} compares responses with; give every row one, or leave "
            "those rows out"
        )


def pass_at(run: Run[OnlineSettings], functions: RewardFunctions | None) -> PassAt | None:
    """What ``--eval_pass_at`` asks for."""
    wanted = run.settings.evaluation
    if not wanted.eval_pass_at:
        return None
    right: Callable[[RolloutBatch], Tensor]
    if wanted.eval_right is not None:
        right = partial(_reaches, wanted.eval_right)
    else:
        right = partial(
            _all_right, _values_of_right({} if functions is None else functions.weights)
        )
    ks = tuple(wanted.eval_pass_at)
    return PassAt(ks, wanted.eval_generations or max(ks), right)


def ask_for_groups(run: Run[OnlineSettings]) -> None:
    """With ``--offline_groups`` prompts are prepared with their judged responses from here on; says
    what is not known of these."""
    rollout = run.settings.rollout
    if not rollout.offline_groups or run.template is None:
        return
    run.template.options = replace(run.template.options, for_groups=rollout.num_generations)
    logger.warning_once(
        "--offline_groups: with which probability another model, or an earlier policy, wrote the "
        "responses is not known, so nothing corrects for it: importance ratios begin at 1, as of "
        "the policy's own"
    )


def check_groups(run: Run[OnlineSettings], prompts: PreparedRows) -> None:
    """Raise ValueError for ``prompts`` without judged responses where these are trained on."""
    if not run.settings.rollout.offline_groups:
        return
    rows = prompts.rows
    named = DIALOGUE in rows.column_names
    without = [row for row, held in enumerate(rows[DIALOGUE]) if held is None] if named else [0]
    if without:
        raise ValueError(
            f"--offline_groups: row {without[0]} of --prompt_dataset has no list of responses with "
            "their scores; expected, beside the prompt, responses and scores of equal length, as "
            "in UltraFeedback and Nectar (docs/data_shapes.md)"
        )


def _values_of_right(names: Mapping[str, float]) -> dict[str, float]:
    """What each function that compares with the ground truth gives for a right response."""
    found = {name: REWARDS[name].right for name in names if name in REWARDS}
    return {name: value for name, value in found.items() if value is not None}


def _reaches(value: float, batch: RolloutBatch) -> Tensor:
    return batch.experience.reward.cpu() >= value


def _all_right(values: Mapping[str, float], batch: RolloutBatch) -> Tensor:
    """(B,): 1 where each function that scores a response gives it the value of a right one, else 0;
    nan where none of them scores it."""
    parts = batch.reward_parts
    scored = [~parts[name].isnan() for name in values]
    reached = [parts[name] >= value for name, value in values.items()]
    wrong = [there & ~good for there, good in zip(scored, reached, strict=True)]
    right = (~torch.stack(wrong).any(0)).float()
    return right.masked_fill(~torch.stack(scored).any(0), torch.nan)
