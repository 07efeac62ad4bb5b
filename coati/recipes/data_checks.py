"""Checks of rows before a model is loaded: supervised end tokens, both kinds of labels, enough
prompts, rows that fit into the model's positions."""

from pathlib import Path
from typing import Any

import numpy as np

from coati.cli.online_settings import OnlineSettings
from coati.cli.settings import KTOSettings
from coati.dataset.data_types import type_of_row
from coati.dataset.load.loader import row_lengths
from coati.models.loading import is_bare
from coati.models.loss import balance
from coati.models.positions import check_tokens, positions_in
from coati.recipes.run import PreparedRows, Run
from coati.utils.logging import get_logger

logger = get_logger(__name__)

LOOKED_AT = 256
# Of the weights of desirable to undesirable responses in all (arXiv 2402.01306, section 4.2).
BALANCED = (1.0, 4 / 3)


def check_ends(run: Run, train: PreparedRows) -> None:
    """Warn when no response among the first rows ends with a supervised end token."""
    ends = {run.tokenizer.eos_token_id}
    if run.template is not None:
        ends |= {stop[-1] for stop in run.template.stop_ids if stop}
    first = train.rows.select(range(min(len(train), LOOKED_AT)))
    sides = [type_of_row(row).sides(row)[0] for row in first]
    last = [side.ids[side.end() - 1] if side.end() else None for side in sides]
    if not ends & set(last):
        logger.warning(
            f"warning: none of the first {len(last)} responses of --dataset ends with a "
            f"supervised end token (ids {', '.join(map(str, sorted(ends)))}): the model will not "
            "learn to stop. Look at end_of_assistant and stop_ids of the conversation template, "
            "and prepare the data again"
        )


def kto_weights(settings: KTOSettings, rows: Any, only_first: bool = False) -> tuple[float, float]:
    """The weights of desirable and undesirable responses: set by ``--auto_weight``, else checked
    for balance. ``only_first``: more rows will come, of which nothing is known.

    Raises ValueError when all rows have one label.
    """
    good = int(np.asarray(rows["label"], dtype=bool).sum())
    bad = len(rows) - good
    if only_first:
        kept = (settings.loss.desirable_weight, settings.loss.undesirable_weight)
        logger.info(
            f"of the first {len(rows)} rows {good} are desirable and {bad} undesirable; with "
            f"--streaming their weights stay {kept[0]:g} and {kept[1]:g}"
        )
        return kept
    if not good or not bad:
        kind, flag = ("desirable", "false") if good else ("undesirable", "true")
        raise ValueError(
            f"--dataset holds {kind} responses only ({len(rows)} rows): KTO learns from the "
            f"difference. Add rows with label {flag}"
            + (", or train on these with coati sft" if good else "")
        )
    weights = (settings.loss.desirable_weight, settings.loss.undesirable_weight)
    ratio = balance(good, bad, *weights)
    if BALANCED[0] <= ratio <= BALANCED[1]:
        return weights
    counts = f"{good} desirable and {bad} undesirable responses"
    what = f"{counts} with weights {weights[0]:g} and {weights[1]:g}"
    if not settings.auto_weight:
        logger.warning(
            f"{what}: their ratio {ratio:.2f} is outside 1 to 4/3, one kind drowns the other; "
            "--auto_weight sets it"
        )
        return weights
    settled = (weights[0] / ratio, weights[1])
    logger.info(
        f"{what}: --auto_weight sets --desirable_weight {settled[0]:.4f}, so that both weigh alike"
    )
    return settled


def reward_moments(rows: Any) -> tuple[float, float]:
    """Mean and standard deviation of the rewards of scored rows, by which they are standardized; a
    deviation of 1 where they are all the same, which is warned of."""
    rewards = np.asarray(rows["reward"], dtype=np.float64)
    mean = float(rewards.mean())
    std = float(rewards.std())
    if std > 1e-12 * max(1.0, abs(mean)):
        return mean, std
    logger.warning(
        f"warning: all {len(rewards)} rows of --dataset have the score {mean:g}: the values have "
        "nothing to tell responses apart by, and the model becomes that of coati sft"
    )
    return mean, 1.0


def check_prompts(
    run: Run[OnlineSettings], prompts: PreparedRows, ptx: PreparedRows | None = None
) -> None:
    """Raise ValueError when there are fewer prompts than an episode takes, or fewer conversations
    than a step."""
    settings = run.settings
    shares = run.data_parallel_size
    rollout = settings.rollout
    needed = rollout.num_collect_steps * rollout.experience_batch_size * shares
    if len(prompts) < needed:
        raise ValueError(
            f"--prompt_dataset holds {len(prompts)} prompts, an episode takes {needed} "
            f"(--num_collect_steps {rollout.num_collect_steps} x --experience_batch_size "
            f"{rollout.experience_batch_size} x {shares} data-parallel processes); lower one of "
            "them or add prompts"
        )
    batch_size = settings.ptx.ptx_batch_size
    steps = settings.update.accumulation_steps
    needed = batch_size * steps * shares
    if ptx is not None and len(ptx) < needed:
        raise ValueError(
            f"--ptx_dataset holds {len(ptx)} rows, one step takes {needed} (--ptx_batch_size "
            f"{batch_size} x --accumulation_steps {steps} x {shares} data-parallel processes); "
            "lower one of them or add rows"
        )


def check_positions(
    run: Run, rows: PreparedRows | None, flag: str = "dataset", kl_rows: bool = False
) -> None:
    """Rows to train or evaluate on against the positions of ``--pretrain``. ``kl_rows``: each
    prompt is also read with the response of another row.

    Raises ValueError where a table of positions ends before the longest row; warns where rotary
    embeddings go on.
    """
    if rows is None or not len(rows):
        return
    model = run.settings.model
    positions = positions_in(model.pretrain, model.trust_remote_code)
    multiple = run.options.sequence_multiple

    def padded(tokens: int) -> int:
        return -(-min(tokens, run.settings.data.max_length) // multiple) * multiple

    if positions is None or padded(run.settings.data.max_length) <= positions.count:
        return
    longest = int(row_lengths(rows.rows).max())
    what = f"--{flag}: the longest row"
    if kl_rows:
        prompts, responses = _longest_parts(rows.rows)
        if prompts + responses > longest:
            longest = prompts + responses
            what = f"--{flag}: a prompt with the response of another row (KTO's KL term)"
    remedy = f"use --max_length {positions.count // multiple * multiple}"
    check_tokens(positions, padded(longest), what, remedy)


def _longest_parts(rows: Any) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest response."""
    columns = rows.select_columns(["prompt", "completion"]).with_format("arrow")
    longest = {"prompt": 0, "completion": 0}
    for start in range(0, len(rows), 1000):
        part = columns[start : start + 1000]
        for name in longest:
            lengths = part.column(name).combine_chunks().value_lengths().to_numpy()
            longest[name] = max(longest[name], int(lengths.max()))
    return longest["prompt"], longest["completion"]


def check_rollout_positions(
    run: Run[OnlineSettings], prompts: PreparedRows | None, flag: str = "prompt_dataset"
) -> None:
    """Raise ValueError where a prompt and its response exceed the positions of the policy: what it
    writes beyond them is an error or noise."""
    if prompts is None:
        return
    settings = run.settings
    positions = positions_in(settings.model.pretrain, settings.model.trust_remote_code)
    longest = int(row_lengths(prompts.rows).max())
    response = settings.rollout.max_seq_len
    if positions is None or longest + response <= positions.count:
        return
    raise ValueError(
        f"--{flag}: the longest prompt has {longest} tokens and its response up to {response} "
        f"(--max_seq_len), this {positions.family} model has {positions.count} positions; use "
        f"--max_length {positions.count}, or lower --max_seq_len"
    )


def check_reader_positions(
    run: Run[OnlineSettings], prompts: PreparedRows, flag: str, path: str
) -> None:
    """Prompts with their responses against the positions of another model that reads them, the
    reward model or the critic of ``--flag``. Errors as :func:`check_positions`."""
    settings = run.settings
    trust = settings.model.trust_remote_code
    if not Path(path).is_dir() or is_bare(path):
        return
    tokens = int(row_lengths(prompts.rows).max()) + settings.rollout.max_seq_len
    positions = positions_in(path, trust)
    count = 0 if positions is None else positions.count
    remedy = f"use --max_length {count}"
    check_tokens(positions, tokens, f"--{flag} {path}: a prompt with its response", remedy)
