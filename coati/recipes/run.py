"""A run: what was asked for, and what is found out before a model is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from coati.cli.online_settings import OnlineSettings
from coati.cli.row_flags import template_args
from coati.cli.settings import DataSettings, TrainingSettings
from coati.dataset.chat.conversation import Conversation, setup_conversation_template
from coati.dataset.load.loader import part_directories, preparation_of
from coati.dataset.metadata import probe_tokens
from coati.models.added_tokens import add_tokens
from coati.models.tokenizer import load_tokenizer
from coati.parallel.agreement import agree
from coati.parallel.boost import prepare_colossalai
from coati.parallel.launch import launch, warn_of_threads
from coati.parallel.plugins import ParallelOptions
from coati.parallel.shared_folder import check_shared
from coati.recipes.defaults import check_precision, resolved_options, within_model
from coati.recipes.extras import NO_EXTRAS, Extras
from coati.recipes.prepared import is_raw
from coati.recipes.resume import (
    Resume,
    compare_with_checkpoint,
    find_resume,
    record_arguments,
)
from coati.recipes.run_dir import lock_save_dir, record_run
from coati.recipes.same_run import run_facts
from coati.recipes.started_by import warn_of_secrets
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger
from coati.utils.memory import resident_mb
from coati.utils.phases import phase

logger = get_logger(__name__)

S_co = TypeVar("S_co", bound=TrainingSettings, covariant=True)
Settings = TypeVar("Settings", bound=TrainingSettings)


@dataclass(frozen=True)
class Run(Generic[S_co]):
    """What the recipes' parts are given instead of flags.

    ``options``: the parallel settings with every default resolved. ``template``: None where the
    tokenizer has none and the data do not say theirs. ``extras``: objects of a Python caller.
    ``added_tokens``: those of ``--add_tokens`` that the tokenizer of the start did not have.
    ``resident_before``: MiB of the process before anything of the run was loaded.
    """

    settings: S_co
    options: ParallelOptions
    resume: Resume
    tokenizer: Any
    template: Conversation | None
    extras: Extras = NO_EXTRAS
    added_tokens: tuple[str, ...] = ()
    resident_before: float = 0.0

    @property
    def flags(self) -> dict[str, Any]:
        """The flags, those resolved on this machine too."""
        return _resolved(self.settings, self.options)

    @property
    def data_parallel_size(self) -> int:
        """Processes that read different rows."""
        return world_size() // self.options.model_parallel_size


@dataclass(frozen=True)
class PreparedRows:
    """Tokenized rows. ``folders``: the prepared directories they come from, ``sizes``: how many
    come from each."""

    rows: Any
    folders: list[str]
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def beside(self, name: str) -> Path:
        """A folder ``name`` next to the prepared parts, for what belongs to these rows."""
        return part_directories(self.folders[0])[0].parent / name


def start(
    settings: Settings, extras: Extras = NO_EXTRAS, needs_template: bool = True
) -> Run[Settings]:
    """Join the other processes, lock --save_dir, resolve the defaults, find the checkpoint to
    resume from, compare the flags with its own, load the tokenizer and record the flags.

    ``needs_template``: raw rows are written by a conversation template; plain texts are not.
    Raises ValueError naming the flag, RanksDiffer on every rank for what they do not have in
    common: flags, the files that they name, or ``--save_dir``.
    """
    options = join_processes(settings)
    settings = within_model(settings)
    check_shared(
        "--save_dir",
        settings.output.save_dir,
        "each process writes its part of a checkpoint there",
        create=not settings.output.dry_run,
    )
    lock_save_dir(settings.output)
    resume = find_resume(settings.output)
    # First: what another tokenizer or template makes impossible is the flag's doing.
    compare_with_checkpoint(resume, _resolved(settings, options))
    before = resident_mb()
    tokenizer, template, added = _tokenizer_and_template(settings, needs_template)
    run = Run(settings, options, resume, tokenizer, template, extras, added, before)
    record_run(settings.output, resume.began, resume.goes_on)
    record_arguments(settings.output, run.flags, settings.flags_given)
    return run


def _resolved(settings: TrainingSettings, options: ParallelOptions) -> dict[str, Any]:
    """The flags of ``settings``, with those that ``options`` resolved."""
    resolved = {"plugin": options.plugin, "mixed_precision": options.precision}
    return {**settings.flags, **resolved}


def join_processes(settings: TrainingSettings) -> ParallelOptions:
    """Join the process group; the parallel settings with every default resolved."""
    # The group comes first: ColossalAI's import takes seconds that would count against the other
    # ranks' timeout.
    with phase("waiting for the other processes"):
        launch(settings.seed, timeout_s=settings.launch.collective_timeout)
    warn_of_threads()
    warn_of_secrets()

    def resolved() -> ParallelOptions:
        options = resolved_options(settings)
        check_precision(options.precision)
        return options

    options = agree(lambda options: run_facts(settings, options), resolved)
    with phase("importing ColossalAI"):
        prepare_colossalai()
    return options


def _tokenizer_and_template(
    settings: TrainingSettings, needed: bool
) -> tuple[Any, Conversation | None, tuple[str, ...]]:
    """The tokenizer, right-padding, and the conversation template: the flag's, the data's, or the
    tokenizer's own; and the tokens that were added to the tokenizer."""
    model = settings.model
    data = settings.data
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    tokenizer.padding_side = "right"
    added = add_tokens(tokenizer, model.add_tokens) if model.add_tokens else ()
    prepared = [found for path in data.dataset if (found := _preparation(path)) is not None]
    config = data.conversation_template_config
    if config is None:  # rows of plain texts were made without one
        made_with = (found["conversation_template"] for found in prepared)
        config = next(filter(None, made_with), None)
    _check_prepared_options(data, prepared)
    _check_columns(settings)
    for found in prepared:
        _check_same_vocabulary(tokenizer, found)
    if config is None and tokenizer.chat_template is None:
        if not (needed and any(map(is_raw, data.dataset))):
            logger.info(
                "the tokenizer has no chat template and the data do not say theirs: none is saved "
                "with the model"
            )
            return tokenizer, None, added
    args = template_args(data.template_args)
    try:
        template = setup_conversation_template(
            tokenizer, config, save_path=None, template_args=args, options=data.row_options
        )
    except ValueError as error:
        if needed or config is not None:
            raise
        logger.info(f"{str(error).splitlines()[0]}: none is saved with the model")
        return tokenizer, None, added
    tokenizer.chat_template = template.portable_template  # saved with the model
    return tokenizer, template, added


def _check_prepared_options(data: DataSettings, prepared: list[dict[str, Any]]) -> None:
    """Prepared rows keep what they were made with: say which flags do nothing for them. Raises
    ValueError for other arguments of the template than theirs."""
    for found in prepared:
        theirs = (found["conversation_template"] or {}).get("template_args") or {}
        asked = template_args(data.template_args)
        if asked is not None and asked != theirs:
            raise ValueError(
                f"--template_args {data.template_args}: --dataset was prepared with "
                f"{json.dumps(theirs)}; leave the flag out, or prepare the rows again with it"
            )
    if prepared and (named := data.row_options.named()):
        flags = ", ".join(f"--{name} {value}" for name, value in named.items())
        logger.warning(
            f"{flags}: nothing changes for rows that are prepared; give it to coati prepare"
        )


def _check_columns(settings: TrainingSettings) -> None:
    """Refuse flags that name columns where there are none to read: rows that are prepared have
    been read."""
    data = settings.data
    paths = [*data.dataset, *data.eval_dataset]
    beside = settings.ptx.ptx_dataset if isinstance(settings, OnlineSettings) else []
    given = {
        f"--columns {' '.join(data.columns)}": data.columns and paths,
        "--strict_columns": data.strict_columns and [*paths, *beside],
    }
    for flag, read in given.items():
        if read and not any(map(is_raw, read)):
            raise ValueError(
                f"{flag} says how raw rows are read, and {' '.join(read)} "
                f"{'is' if len(read) == 1 else 'are all'} prepared already; leave it out, or "
                "prepare the rows again with it (coati prepare)"
            )
    done = [path for path in paths if not is_raw(path)]
    if data.columns and done:
        logger.info(f"--columns: nothing changes for {' '.join(done)}, prepared already")


def _preparation(path: str) -> dict[str, Any] | None:
    """:func:`preparation_of`. Raises ValueError where it does not say what is read of it here."""
    found = preparation_of(path)
    for name in ("tokenizer", "conversation_template") if found is not None else ():
        if not isinstance(found.get(name), dict):
            raise ValueError(
                f"--dataset {path}: its preparation.json has no {name}, with which the rows were "
                "made; copy it again, or prepare the data again with coati prepare"
            )
    return found


def _check_same_vocabulary(tokenizer: Any, prepared: Mapping[str, Any]) -> None:
    made_with = prepared["tokenizer"]
    if made_with["vocab_size"] != len(tokenizer):
        raise ValueError(
            f"--dataset was prepared with the tokenizer {made_with['path']} of "
            f"{made_with['vocab_size']} tokens, --tokenizer_dir has {len(tokenizer)}; prepare the "
            "data with this model's tokenizer"
        )
    before = made_with.get("probe")  # rows of earlier releases do not say
    now = probe_tokens(tokenizer)
    if before is not None and before != now:
        place = next(
            (i for i, (old, new) in enumerate(zip(before, now, strict=False)) if old != new),
            min(len(before), len(now)),
        )
        shown = [
            tokenizer.convert_ids_to_tokens(ids[place]) if place < len(ids) else "nothing"
            for ids in (before, now)
        ]
        raise ValueError(
            f"--dataset was prepared with the tokenizer {made_with['path']}, which split a text of "
            f"{len(before)} tokens otherwise: token {place} is {shown[0]!r} there and {shown[1]!r} "
            "with --tokenizer_dir; prepare the data again with this model's tokenizer and the "
            "installed releases"
        )
