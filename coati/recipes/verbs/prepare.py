"""Tokenize conversations, preferences or prompts into shards, with a report."""

import sys
from pathlib import Path
from typing import Any

from coati.cli.prepare import CLEANING_FLAGS, parse_prepare, prepare_parser
from coati.cli.program_settings import PrepareSettings
from coati.cli.row_flags import template_args
from coati.cli.verb import Verb
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

VERB = Verb(
    "data",
    prepare_parser,
    parse_prepare,
    "coati.recipes.verbs.prepare:main",
    subject="--data_input_dirs",
)


def main(args: PrepareSettings) -> None:
    """Prepare the rows, or only check the template (``--check_template``)."""
    check(args) if args.check_template else prepare(args)


def prepare(args: PrepareSettings) -> None:
    """Raw rows to shards. Says where they are."""
    from coati.dataset.chat.conversation import setup_conversation_template
    from coati.dataset.chat.plain_text import PlainText
    from coati.dataset.chat.row_options import RowOptions
    from coati.dataset.data_types import DATA_TYPES
    from coati.dataset.prepare.staging import check_outputs
    from coati.dataset.rows.input_files import find_files
    from coati.models.added_tokens import add_tokens
    from coati.models.tokenizer import load_tokenizer

    # Fail before anything is loaded where a path alone is wrong.
    find_files(args.data_input_dirs + args.eval_input_dirs, args.split)
    check_outputs(args.data_jsonl_output_dir, args.data_arrow_output_dir)
    tokenizer = load_tokenizer(args.tokenizer_dir, trust_remote_code=args.trust_remote_code)
    add_tokens(tokenizer, args.add_tokens)
    template: Any
    if DATA_TYPES[str(args.type)].templated:
        template = setup_conversation_template(
            tokenizer,
            args.conversation_template_config,
            template_mode=args.template_mode,
            template_args=template_args(args.template_args),
            options=RowOptions(args.thoughts, args.empty_thoughts, args.learn),
        )
    else:
        template = PlainText(tokenizer)
    with phase("preparing the rows"):
        _prepare(args, tokenizer, template)
    print(f"look at the report first: {args.data_jsonl_output_dir}/report.html")
    rows = args.data_arrow_output_dir
    has_evaluation = args.eval_ratio or args.eval_input_dirs
    evaluation = f" --eval_dataset {rows}/eval" if has_evaluation else ""
    print(f"the rows are in {rows}; train on them with --dataset {rows}{evaluation}")


def _prepare(args: PrepareSettings, tokenizer: Any, template: Any) -> None:
    from coati.dataset.clean.cleaning import Cleaning
    from coati.dataset.prepare.preparation import prepare_dataset

    prepare_dataset(
        type=args.type,
        format=args.format,
        columns=args.columns,
        strict_columns=args.strict_columns,
        documents=args.documents,
        split=args.split,
        inputs=args.data_input_dirs,
        tokenizer=tokenizer,
        tokenizer_name=args.tokenizer_dir,
        template=template,
        jsonl_dir=args.data_jsonl_output_dir,
        arrow_dir=args.data_arrow_output_dir,
        cache_dir=args.data_cache_dir,
        max_length=longest_row(args, tokenizer),
        num_bins=args.num_spliced_dataset_bins,
        num_samples_per_bin=args.num_samples_per_datafile,
        seed=args.seed,
        num_proc=args.num_proc,
        strict=args.strict,
        max_bad_ratio=args.max_bad_ratio,
        eval_ratio=args.eval_ratio,
        eval_inputs=args.eval_input_dirs,
        cleaning=Cleaning(**{name: getattr(args, name) for name in CLEANING_FLAGS}),
    )


def longest_row(args: PrepareSettings, tokenizer: Any) -> int:
    """``--max_length``; by default at most what the model of ``--tokenizer_dir`` has positions."""
    from coati.models.positions import positions_in

    count = tokenizer.model_max_length  # about 1e30 where the tokenizer does not know
    whose = "this tokenizer's model_max_length"
    if (Path(args.tokenizer_dir) / "config.json").is_file():
        positions = positions_in(args.tokenizer_dir, args.trust_remote_code)
        if positions is not None:
            count = positions.count
            whose = f"the positions of this {positions.family} model"
    if args.max_length <= count:
        return args.max_length
    if args.length_given:
        logger.warning(
            f"--max_length {args.max_length} is more than {whose}, {count}: to train longer rows "
            "may be impossible, or beyond what the model has seen"
        )
        return args.max_length
    logger.info(f"--max_length is {count} by default here: {whose}.")
    return int(count)


def check(args: PrepareSettings) -> None:
    """Print all findings about the template; exit code 1 if it cannot be trained on."""
    from coati.dataset.chat.template_lint import check_template
    from coati.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer_dir, trust_remote_code=args.trust_remote_code)
    color = sys.stdout.isatty()
    report = check_template(
        tokenizer,
        args.conversation_template_config,
        args.template_mode,
        color,
        template_args(args.template_args),
    )
    print(report.lines())
    if report.errors:
        sys.exit(1)
