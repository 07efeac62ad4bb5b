"""What can be found wrong with the flags of the preference scripts before torch is imported."""

from argparse import Namespace

from coati.models.loss_registry import LOSS_TYPES, SFT, PairwiseLoss, needs_reference
from coati.parallel.plugin_checks import scalar_head_problem
from coati.parallel.plugins import PLUGINS


def check_pairs(args: Namespace) -> None:
    """A pair is two rows of one micro-batch."""
    if args.pp > 1 and args.microbatch_size % 2:
        raise ValueError(
            f"--microbatch_size {args.microbatch_size} would split a pair, which is two rows; use "
            "an even number"
        )


def check_rm(args: Namespace) -> None:
    if args.pp > 1:
        raise ValueError(
            f"--pp {args.pp}: a reward model cannot be split into pipeline stages; use --tp, or "
            "--plugin zero2 or gemini"
        )
    wrong = "the gradients of a reward model's head"
    if problem := scalar_head_problem(args.plugin, args.tp, args.zero_stage, wrong):
        raise ValueError(problem)
    if args.disable_loss_mask:
        raise ValueError(
            "--disable_loss_mask does nothing for a reward model: a score is of a whole "
            "conversation"
        )


def check_dpo(args: Namespace) -> None:
    """Check the losses and their options; settles ``loss_type`` to a list, and ``beta`` and
    ``gamma`` where the losses agree on them."""
    if isinstance(args.loss_type, str):
        args.loss_type = [args.loss_type]
    _check_losses(args)
    losses = {name: LOSS_TYPES[name] for name in args.loss_type if name != SFT}
    _check_loss_options(args, losses)
    _check_reference(args)
    for flag in ("beta", "gamma"):
        defaults = {getattr(row, flag) for row in losses.values()}
        if getattr(args, flag) is None and len(defaults) == 1:
            setattr(args, flag, defaults.pop())


def _check_losses(args: Namespace) -> None:
    names = args.loss_type
    given = f"--loss_type {' '.join(names)}"
    if names == [SFT]:
        raise ValueError(
            f"{given} has no loss over pairs; add one ({', '.join(LOSS_TYPES)}), or use coati sft"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{given} names {twice[0]} twice; name it once, with --loss_weights")
    if args.loss_weights is not None and len(args.loss_weights) != len(names):
        raise ValueError(
            f"--loss_weights {' '.join(f'{w:g}' for w in args.loss_weights)}: found "
            f"{len(args.loss_weights)} weights, expected {len(names)}, one for each loss of {given}"
        )
    if SFT in names and args.sft_coef:
        raise ValueError(
            f"{given} and --sft_coef {args.sft_coef:g} both weigh the chosen response's own loss; "
            "leave one out"
        )


def _check_loss_options(args: Namespace, losses: dict[str, PairwiseLoss]) -> None:
    given = f"--loss_type {' '.join(losses)}"
    for flag in ("gamma", "label_smoothing"):
        if getattr(args, flag) and not any(flag in row.takes for row in losses.values()):
            takers = " or ".join(name for name, other in LOSS_TYPES.items() if flag in other.takes)
            raise ValueError(f"--{flag} does nothing with {given}; it belongs to {takers}")
    if "robust" in losses and not args.label_smoothing:
        raise ValueError(
            f"{given} needs --label_smoothing, the share of pairs that are labeled the wrong way "
            "round"
        )
    if args.label_smoothing and args.gamma:
        raise ValueError("--label_smoothing takes no --gamma: conservative DPO has none")
    averaged = [name for name, row in losses.items() if row.averaged]
    if args.ld_alpha is not None and (averaged or args.length_normalization):
        raise ValueError(
            "--ld_alpha weighs tokens of a sum; averages "
            f"({', '.join(averaged) or '--length_normalization'}) have none"
        )


def _check_reference(args: Namespace) -> None:
    if needs_reference(args.loss_type) and not args.disable_reference_model:
        check_ref_tp(args)
        return
    none = f"--loss_type {' '.join(args.loss_type)}"
    if args.disable_reference_model:
        none = "--disable_reference_model"
    for flag in ("ref_tp", "precompute_ref"):
        if getattr(args, flag, None):
            raise ValueError(f"--{flag} does nothing with {none}: there is no reference model")


def check_ref_tp(args: Namespace) -> None:
    """Processes that split the reference must have the same rows: those that split the policy."""
    if args.ref_tp is None or args.ref_tp == args.tp:
        return
    if args.plugin is not None and not PLUGINS[args.plugin].hybrid:
        raise ValueError(f"--ref_tp {args.ref_tp} belongs to --plugin 3d, not {args.plugin}")
    if args.pp > 1 or args.enable_sequence_parallelism or args.tp % args.ref_tp:
        raise ValueError(
            f"--ref_tp {args.ref_tp}: the processes that split the reference must share their "
            "rows, so it divides --tp "
            f"{args.tp} and there is no --pp or sequence parallelism; set --tp {args.ref_tp}, or "
            "leave it out"
        )


def check_kto(args: Namespace) -> None:
    if args.pp > 1:
        raise ValueError(
            f"--pp {args.pp}: KTO needs log-probs of a whole global batch before its first "
            "backward pass, which a pipeline does not give; use --tp, or --plugin zero2 or gemini"
        )
    check_ref_tp(args)
