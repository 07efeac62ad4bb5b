"""Checks of flags before torch is imported. All raise ValueError with flag, finding and remedy."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from coati.cli.hub_flags import check_hub_id
from coati.cli.launch_flags import check_launch, processes_of
from coati.cli.lora_flags import check_lora
from coati.cli.parser import OlderFlags, Parser
from coati.cli.row_flags import check_columns
from coati.cli.settings import TrainingSettings
from coati.cli.streaming_flags import check_streaming
from coati.dataset.rows.input_names import parse_input
from coati.parallel.lr_schedule import DECAY, DECAYING, FLOOR
from coati.parallel.optimizer_table import OPTIMIZERS, installed_problem, optimizer_problem
from coati.parallel.options import ParallelOptions
from coati.parallel.plugin_checks import check_options, resolve_options
from coati.parallel.plugins import HYBRID
from coati.utils.json_io import load_json
from coati.utils.packages import check_packages
from coati.utils.resources import template_path


def checked(
    parser: Parser,
    argv: Sequence[str] | None,
    *checks: Callable[[Namespace], None],
    older: OlderFlags | None = None,
) -> Namespace:
    """The parsed flags, after ``checks``. Exits with code 2 and one line naming a wrong flag."""
    if older is not None:
        older.add(parser)
    args = parser.parse_args(argv)
    try:
        if older is not None:
            older.apply(args)
        for check in checks:
            check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_offline(args: Namespace, rows_per_sample: int = 1) -> None:
    """Check the flags that all trainers on fixed data share, and settle ``lora_rank``.

    ``rows_per_sample``: as in :func:`requested_options`.
    """
    if not args.pretrain:
        raise ValueError(
            "--pretrain is missing: the Hugging Face model directory or hub name to start from"
        )
    if not args.dataset:
        raise ValueError(
            "--dataset is missing: prepared arrow directories (coati prepare) or a raw json file"
        )
    check_paths(args)
    args.add_tokens = tokens_of(args.add_tokens)
    check_columns(args)
    check_mixture(args, args.dataset)
    check_streaming(args)
    check_lora(args)
    check_pointless(args)
    check_launch(args)
    options = requested_options(args, rows_per_sample=rows_per_sample)
    check_parallel(args.plugin, options, processes_of(args))
    check_optimizer(args, options)


def tokens_of(words: Sequence[str]) -> list[str]:
    """The tokens of ``--add_tokens``, those of its .txt files in place of these."""
    found: list[str] = []
    for word in words:
        if not word.endswith(".txt"):
            found.append(word)
            continue
        try:
            lines = Path(word).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(
                f"--add_tokens {word}: {error.strerror}; expected a file of tokens, one a line"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--add_tokens {word}: not UTF-8 text (byte {error.start})") from error
        tokens = [line for line in lines if line.strip()]
        if not tokens:
            raise ValueError(f"--add_tokens {word}: holds no token; expected one a line")
        found += tokens
    return found


def check_paths(args: Namespace, data: tuple[str, ...] = ("dataset", "eval_dataset")) -> None:
    """Every named input must be there, and ``--push_to_hub`` name a repository. ``data``: the flags
    that name rows; a hub name will do but to evaluate on."""
    check_hub_id(args.push_to_hub)
    for flag in data:
        for path in getattr(args, flag):
            here = Path(parse_input(path).base).exists()
            if not here and (flag.startswith("eval_") or not _may_be_hub_name(path)):
                raise ValueError(f"--{flag} {path}: there is no such file or directory")
    files = {
        "lora_config": args.lora_config,
        "plugin_args": args.plugin_args,
        "conversation_template_config": named_template(args.conversation_template_config),
    }
    for flag, path in files.items():
        if path is not None and not isinstance(read_json(flag, path), dict):
            raise ValueError(
                f"--{flag} {path}: expected a JSON object {{...}}, found another kind of value"
            )
    if args.checkpoint_path not in (None, "auto") and not Path(args.checkpoint_path).is_dir():
        raise ValueError(
            f"--checkpoint_path {args.checkpoint_path}: there is no such directory; name one, or "
            "`auto`"
        )
    if args.checkpoint_weights_only and args.checkpoint_path is None:
        raise ValueError("--checkpoint_weights_only does nothing without --checkpoint_path")


def check_models(settings: TrainingSettings) -> None:
    """A model is a directory that is there, or may be the name of one on the hub; said before
    anything is loaded."""
    for flag in ("pretrain", "tokenizer_dir", "rm_pretrain", "critic_pretrain", "teacher"):
        path = settings.flags.get(flag)
        if path and "/" in path and not Path(path).exists() and not _may_be_hub_name(path):
            raise ValueError(
                f"--{flag} {path}: there is no such directory; name a Hugging Face directory, or a "
                "model of the hub (owner/name)"
            )
        if path and Path(path).exists():
            _check_place(flag, Path(path))


def _check_place(flag: str, place: Path) -> None:
    """Raise ValueError for a file, for a directory with nothing in it, and for a base without a
    configuration; a run's own directory is looked at when its model is loaded."""
    if not place.is_dir():
        raise ValueError(f"--{flag} {place} is a file; name a Hugging Face directory")
    there = sorted(entry.name for entry in place.iterdir())
    whole = {"config.json", "adapter_config.json", "modeling"}.intersection(there)
    if not there or (flag == "pretrain" and not whole):
        holds = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "nothing"
        raise ValueError(
            f"--{flag} {place}: no config.json, so this is not a Hugging Face model directory; it "
            f"holds {holds}; name one that is, or a model of the hub (owner/name)"
        )


def _may_be_hub_name(path: str) -> bool:
    """``owner/name`` or ``owner/name:subset``, where no folder ``owner`` is here."""
    owner, _, name = path.partition(":")[0].partition("/")
    return (
        bool(owner and name)
        and "/" not in name
        and owner[0] not in ".~"
        and not Path(owner).is_dir()
    )


def named_template(given: str | None, may_be_new: bool = False) -> Path | None:
    """The file that ``--conversation_template_config`` names, as
    :func:`~coati.utils.resources.template_path` finds it."""
    if given is None:
        return None
    try:
        return template_path(given, may_be_new)
    except ValueError as error:
        raise ValueError(f"--conversation_template_config {error}") from error


def check_mixture(args: Namespace, paths: list[str]) -> None:
    """One weight for each data set, and no flag that cuts the sets otherwise."""
    weights = args.dataset_weights
    if not weights:
        return
    if len(weights) != len(paths):
        raise ValueError(
            f"--dataset_weights has {len(weights)} values ({' '.join(f'{w:g}' for w in weights)}), "
            "--dataset has "
            f"{len(paths)} paths ({' '.join(paths)}); give one weight for each path"
        )
    if args.max_samples:
        raise ValueError(
            "--max_samples takes the first rows of all --dataset paths laid end to end, which "
            "--dataset_weights mixes; "
            "use --max_steps to train for less than an epoch"
        )


def read_json(flag: str, path: str | Path) -> Any:
    try:
        return load_json(path)
    except OSError as error:
        raise ValueError(f"--{flag} {path}: {error.strerror}; expected a JSON file") from error
    except ValueError as error:
        raise ValueError(f"--{flag} {error}") from error


def check_pointless(args: Namespace) -> None:
    """A flag that would have no effect is a mistake somewhere else."""
    for flag in ("eval_interval", "eval_batch_size"):
        if getattr(args, flag) is not None and not (args.eval_dataset or args.eval_ratio):
            raise ValueError(f"--{flag} does nothing without --eval_dataset or --eval_ratio")
    check_evaluation(args, "dataset", "eval_dataset", ("metric_for_best",))
    check_schedule(args)


def check_evaluation(args: Namespace, rows: str, held_out: str, flags: tuple[str, ...]) -> None:
    """Refuse two kinds of evaluation rows, and ``flags`` and early stopping without any. ``rows``
    and ``held_out``: the flags that name rows."""
    given = getattr(args, held_out)
    if given and args.eval_ratio:
        raise ValueError(
            f"--eval_ratio takes evaluation rows out of --{rows}, --{held_out} names others; give "
            "one"
        )
    if args.early_stopping_threshold and args.early_stopping_patience is None:
        raise ValueError(
            "--early_stopping_threshold does nothing without --early_stopping_patience"
        )
    own_split = any(not Path(path).is_file() for path in getattr(args, rows))
    if given or args.eval_ratio or own_split:
        return
    for flag in (*flags, "early_stopping_patience"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} does nothing without --{held_out} or --eval_ratio")


def check_schedule(args: Namespace) -> None:
    """Refuse what the schedule of ``--lr_scheduler`` does not have."""
    name = args.lr_scheduler
    if name not in DECAYING and args.lr_min_ratio != FLOOR:
        raise ValueError(
            f"--lr_min_ratio does nothing with --lr_scheduler {name}, which does not decay; it "
            f"belongs to {', '.join(DECAYING)}"
        )
    if name != "wsd" and args.decay_ratio != DECAY:
        raise ValueError(
            f"--decay_ratio does nothing with --lr_scheduler {name}; it belongs to wsd"
        )


def requested_options(
    args: Namespace, batch_size: int | None = None, rows_per_sample: int = 1
) -> ParallelOptions:
    """The parallel flags as one value, before the machine has been looked at.

    ``batch_size``: samples of a micro-batch, by default ``--batch_size``; ``rows_per_sample``: rows
    of the model's batch that a sample makes (a pair: 2).
    """
    known = {field.name for field in fields(ParallelOptions)} & set(vars(args))
    values = {name: getattr(args, name) for name in known}
    values |= {
        "plugin": args.plugin or HYBRID,
        "precision": args.mixed_precision,
        "plugin_args": load_json(args.plugin_args) if args.plugin_args else {},
        "lora": args.lora_rank > 0,
        "batch_size": (batch_size or args.batch_size) * rows_per_sample,
    }
    return ParallelOptions(**values)


def check_optimizer(args: Namespace, options: ParallelOptions) -> None:
    """Refuse an ``--optim`` that is not installed, that the plugin cannot train with as far as it
    is known before the machine has been looked at, or that lacks what another flag sets."""
    name = args.optim
    if "adam_beta2" in args._written and not OPTIMIZERS[name].beta2:
        takers = ", ".join(other for other, row in OPTIMIZERS.items() if row.beta2)
        raise ValueError(f"--adam_beta2 does nothing with --optim {name}; it belongs to {takers}")
    problem = installed_problem(name)
    if problem is None and (args.plugin is not None or options.needs_hybrid):
        problem = optimizer_problem(name, resolve_options(options)[0])
    if problem is not None:
        raise ValueError(problem)


def check_parallel(plugin: str | None, options: ParallelOptions, world_size: int) -> None:
    """Refuse to train without ColossalAI, and what ``plugin`` cannot do in ``world_size``
    processes as far as it is known before the machine has been looked at."""
    check_packages()
    if plugin is None and not options.needs_hybrid:
        return
    # Every plugin has bf16; the default is chosen to fit the plugin once the machine is known.
    options = replace(options, precision=options.precision or "bf16")
    check_options(world_size=world_size, **vars(options))
