"""What the flags of trackers decide together."""

from argparse import Namespace

from coati.utils.tracker_table import missing_problem, named

RUNS = "runs"  # of --save_dir, where Hugging Face's trainers write TensorBoard's files, too


def settle_trackers(args: Namespace) -> None:
    """Let ``report_to``, ``log_dir`` and ``use_wandb`` say the same, where a command has them.

    Raises ValueError for a tracker that is unknown or not installed.
    """
    if "report_to" not in args:
        return
    asked = named(args.report_to, args.log_dir, args.use_wandb)
    for name in asked:
        if problem := missing_problem(name):
            raise ValueError(problem)
    args.report_to = asked
    args.use_wandb = "wandb" in asked
    if "tensorboard" in asked and args.log_dir is None:
        args.log_dir = f"{args.save_dir}/{RUNS}"
