"""What can be found wrong with the flags of the preference scripts before torch is imported."""

from argparse import Namespace

from coati.models.loss_registry import LOSS_TYPES


def check_pairs(args: Namespace) -> None:
    """A pair is two rows of one micro-batch."""
    if args.pp > 1 and args.microbatch_size % 2:
        raise ValueError(
            f"--microbatch_size {args.microbatch_size} would part a pair, which is two rows; use "
            "an even number"
        )


def check_rm(args: Namespace) -> None:
    if args.pp > 1:
        raise ValueError(
            f"--pp {args.pp}: a reward model cannot be cut into pipeline stages; use --tp, or "
            "--plugin zero2 or gemini"
        )
    if args.tp > 1 and (str(args.plugin).startswith("gemini") or args.zero_stage == 3):
        raise ValueError(
            f"--tp {args.tp} under gemini: the gradients of a reward model's head come out wrong "
            "there; use "
            f"--plugin 3d --tp {args.tp} with --zero_stage 0 to 2, or gemini without --tp"
        )
    if args.disable_loss_mask:
        raise ValueError(
            "--disable_loss_mask does nothing for a reward model: a score is of a whole "
            "conversation"
        )


def check_dpo(args: Namespace) -> None:
    """Check the loss's options, and settle ``beta`` and ``gamma``."""
    row = LOSS_TYPES[args.loss_type]
    for flag in ("gamma", "label_smoothing"):
        if getattr(args, flag) and flag not in row.takes:
            takers = " or ".join(name for name, other in LOSS_TYPES.items() if flag in other.takes)
            raise ValueError(
                f"--{flag} does nothing with --loss_type {args.loss_type}; it belongs to {takers}"
            )
    if args.loss_type == "robust" and not args.label_smoothing:
        raise ValueError(
            "--loss_type robust needs --label_smoothing, the share of pairs that are the wrong way "
            "round"
        )
    if args.label_smoothing and args.gamma:
        raise ValueError("--label_smoothing takes no --gamma: conservative DPO has none")
    if args.ld_alpha is not None and (row.averaged or args.length_normalization):
        raise ValueError(
            "--ld_alpha weighs tokens of a sum; averages (--length_normalization, simpo, ipo) have "
            "none"
        )
    _check_reference(args, row.reference)
    args.beta = row.beta if args.beta is None else args.beta
    args.gamma = row.gamma if args.gamma is None else args.gamma


def _check_reference(args: Namespace, wanted: bool) -> None:
    none = (
        "--disable_reference_model"
        if args.disable_reference_model
        else f"--loss_type {args.loss_type}"
    )
    if wanted and not args.disable_reference_model:
        check_ref_tp(args)
        return
    for flag in ("ref_tp", "precompute_ref"):
        if getattr(args, flag):
            raise ValueError(f"--{flag} does nothing with {none}: there is no reference model")


def check_ref_tp(args: Namespace) -> None:
    """Processes that split the reference must have the same rows: those that split the policy."""
    if args.ref_tp is None or args.ref_tp == args.tp:
        return
    if args.plugin not in (None, "3d"):
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
            f"--pp {args.pp}: KTO needs log-probs of a whole window before its first backward, "
            "which a pipeline does "
            "not give; use --tp, or --plugin zero2 or gemini"
        )
    check_ref_tp(args)
