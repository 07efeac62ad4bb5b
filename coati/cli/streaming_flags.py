"""The flags of ``--streaming``, and what it does not go together with. Imports nothing heavy."""

from argparse import Namespace

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_switch
from coati.dataset.rows.row_errors import DEFAULT_BAD_RATIO

SHUFFLE_BUFFER = 10_000
# What needs all rows before the first step, and what to do instead.
NEEDS_ALL_ROWS = {
    "max_samples": "--max_steps says for how long to train",
    "eval_ratio": "name evaluation rows with --eval_dataset",
    "precompute_ref": "let the reference model run beside the policy",
    "auto_weight": "set --desirable_weight and --undesirable_weight",
}
DEFAULTS = {"shuffle_buffer": SHUFFLE_BUFFER, "stream_workers": None}


def add_streaming_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "raw rows", "What becomes of a --dataset that is not prepared."
    )
    add_switch(
        group,
        "--streaming",
        help="read and tokenize the rows of --dataset (raw files, folders of them, names of data "
        "sets on the hub) while training: nothing is prepared on disk, memory does not grow with "
        "the rows; needs --max_steps, and the rows begin again as often as that takes",
    )
    add_count(
        group,
        "--shuffle_buffer",
        default=SHUFFLE_BUFFER,
        unit="ROWS",
        least=0,
        help="--streaming: shuffle the files, and the rows within blocks of this many; 0: in the "
        "order of the files",
    )
    add_count(
        group,
        "--stream_workers",
        unit="N",
        least=0,
        help="--streaming: processes that tokenize, for each training process; 0: that process "
        "itself, between its steps; default: the cores of each process less one, at most 4",
    )
    add_number(
        group,
        "--max_bad_ratio",
        default=DEFAULT_BAD_RATIO,
        unit="R",
        most=1,
        help="end the run when more than this share of the rows is malformed",
    )


def check_streaming(args: Namespace) -> None:
    """Refuse what a stream cannot do, and flags of streams without one."""
    if not getattr(args, "streaming", False):
        for flag, default in DEFAULTS.items():
            if getattr(args, flag, default) != default:
                raise ValueError(f"--{flag} does nothing without --streaming")
        return
    if args.max_steps is None:
        raise ValueError(
            "--streaming needs --max_steps, the optimizer steps of the run: how many rows there "
            "are is not known before they are read, and the learning rate follows from the steps"
        )
    if "max_epochs" in getattr(args, "_given", ()):
        raise ValueError(
            f"--max_epochs {args.max_epochs} does nothing with --streaming, which repeats the rows "
            f"until --max_steps {args.max_steps}; leave it out"
        )
    for flag, instead in NEEDS_ALL_ROWS.items():
        if value := getattr(args, flag, None):
            shown = "" if value is True else f" {value:g}"
            raise ValueError(
                f"--{flag}{shown} needs all rows before the first step, which --streaming does not "
                f"read; {instead}, or drop --streaming"
            )
