"""Prompts, and the conversations learned beside them: rows, and what is checked of them before a
model is loaded."""

from argparse import Namespace
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.parallel.plugins import ParallelOptions
from coati.recipes import data
from coati.rewards.scorer import Rewards
from coati.utils.distributed import world_size


def prompt_rows(args: Namespace, tokenizer: Any, template: Conversation | None):
    """The rows of ``--prompt_dataset``. Prompts longer than ``--max_length`` less ``--max_seq_len``
    are left out and
    counted: cut, they would ask something else. Raises ValueError as
    :func:`coati.recipes.data.rows_of`."""
    return data.rows_of(
        args.prompt_dataset, args, tokenizer, template, type="prompt", flag="prompt_dataset"
    )


def ptx_rows(args: Namespace, tokenizer: Any, template: Conversation | None):
    """The rows of ``--ptx_dataset``, or None where they count for nothing."""
    if not args.ptx_coef:
        return None
    # Weights and --max_samples are the prompts'.
    own = Namespace(**(vars(args) | {"dataset_weights": [], "max_samples": None}))
    return data.rows_of(args.ptx_dataset, own, tokenizer, template, type="sft", flag="ptx_dataset")


def check_prompts(args: Namespace, options: ParallelOptions, rows: Any, ptx: Any = None) -> None:
    """Raise ValueError when there are fewer prompts than an episode takes, or fewer conversations
    than a step."""
    shares = world_size() // options.model_parallel_size
    needed = args.num_collect_steps * args.experience_batch_size * shares
    if len(rows) < needed:
        raise ValueError(
            f"--prompt_dataset holds {len(rows)} prompts, an episode takes {needed} "
            "(--num_collect_steps "
            f"{args.num_collect_steps} x --experience_batch_size {args.experience_batch_size} x "
            f"{shares} data-parallel "
            "processes); lower one of them or add prompts"
        )
    needed = args.ptx_batch_size * args.accumulation_steps * shares
    if ptx is not None and len(ptx) < needed:
        raise ValueError(
            f"--ptx_dataset holds {len(ptx)} rows, one step takes {needed} (--ptx_batch_size "
            f"{args.ptx_batch_size} x "
            f"--accumulation_steps {args.accumulation_steps} x {shares} data-parallel processes); "
            "lower one of them or "
            "add rows"
        )


def check_gt_answers(rows: Any, rewards: Rewards | None, flag: str = "prompt_dataset") -> None:
    """Raise ValueError for ``rows`` without the ground truths that a function of ``rewards``
    compares with."""
    if rows is None or rewards is None or not rewards.needs_gt_answer:
        return
    wanting = ", ".join(rewards.weights)
    if "gt_answer" not in rows.column_names:
        raise ValueError(
            f"--{flag} has no gt_answer, which --reward_functions {wanting} compares responses "
            "with; prepare the "
            "prompts from rows that have one, or choose other functions"
        )
    without = [index for index, answer in enumerate(rows["gt_answer"]) if answer is None]
    if without:
        raise ValueError(
            f"--{flag}: {len(without)} of {len(rows)} prompts have no gt_answer (the first: row "
            f"{without[0]}), which "
            f"--reward_functions {wanting} compares responses with; give every row one, or leave "
            "those rows out"
        )
