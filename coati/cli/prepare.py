"""The flags of ``coati prepare``."""

from argparse import Namespace, _ArgumentGroup
from collections.abc import Sequence

from coati.cli.arguments import add_tokens_flag
from coati.cli.checks import named_template, tokens_of
from coati.cli.parser import Parser
from coati.cli.program_settings import PrepareSettings
from coati.cli.row_flags import add_column_flags, add_learn_flag, add_row_flags
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_switch, add_text
from coati.dataset.chat.row_options import LEARNED_TURNS
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.column_names import parse_columns
from coati.dataset.rows.formats import FORMATS, FORMATS_OF
from coati.dataset.rows.row_errors import (
    DEFAULT_BAD_RATIO,
    DEFAULT_OVERLAP_WORDS,
    DOCUMENTS,
    TEMPLATE_MODES,
)

# The flags that are attributes of coati.dataset.clean.cleaning.Cleaning.
CLEANING_FLAGS = (
    "deduplicate",
    "near_duplicates",
    "drop_eval_overlap",
    "benchmark_files",
    "overlap_words",
    "min_answer_chars",
    "max_answer_chars",
    "drop_trivial_answers",
)


def prepare_parser() -> Parser:
    """The parser of ``coati prepare``."""
    parser = Parser(
        prog="coati prepare",
        usage="%(prog)s --type TYPE --data_input_dirs PATH[,PATH ...] --tokenizer_dir MODEL "
        "[flags]",
        description="Tokenizes raw rows into the shards that training reads, and reports what "
        "became of every row.",
    )
    parser.add_argument("--type", choices=DATA_TYPES, help="what the rows are for (required)")
    parser.add_argument(
        "--data_input_dirs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="comma- or space-separated: files (.jsonl .ndjson .json .csv .tsv .txt, also .gz "
        ".zst; .parquet), folders of them, save_to_disk directories, hub datasets "
        "(owner/name:subset), or LLaMA-Factory's dataset_info.json (dataset_info.json:name); each "
        "may end with @split and #rows (required)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="row format of all inputs; default: recognized row by row from the keys",
    )
    add_documents_flag(parser)
    add_column_flags(parser)
    add_text(
        parser, "--split", unit="NAME", help="split of a dataset that has several; default: train"
    )
    parser.add_argument(
        "--tokenizer_dir",
        metavar="MODEL",
        help="directory or hub name of the tokenizer (required)",
    )
    add_switch(parser, "--trust_remote_code", help="run Python files that come with the tokenizer")
    add_tokens_flag(parser)
    _add_template_flags(parser)
    _add_output_flags(parser)
    _add_evaluation_flags(parser)
    _add_cleaning_flags(parser)
    return parser


def add_documents_flag(parser: Parser | _ArgumentGroup) -> None:
    parser.add_argument(
        "--documents",
        choices=DOCUMENTS,
        help="what of a .txt file is a document of --type text: all of it, each paragraph (blank "
        "lines between them), or each line; default: file",
    )


def _add_template_flags(parser: Parser) -> None:
    add_text(
        parser,
        "--conversation_template_config",
        unit="FILE",
        help="template JSON, or the name of a template that comes with coati, such as "
        "Qwen/Qwen3-8B; a .json file that does not exist gets the tokenizer's own template; "
        "default: the tokenizer's own",
    )
    parser.add_argument(
        "--template_mode",
        choices=TEMPLATE_MODES,
        default=TEMPLATE_MODES[0],
        help="for a template that rewrites earlier assistant turns: one row per turn, or an error",
    )
    add_row_flags(parser)
    add_learn_flag(parser)
    add_switch(
        parser,
        "--check_template",
        help="print a sample dialogue as the template renders it, the supervised part marked, and "
        "list problems; exit code 1 if training would go wrong; needs only --tokenizer_dir",
    )


def _add_output_flags(parser: Parser) -> None:
    add_text(parser, "--data_cache_dir", default="cache", help="scratch space, emptied at the end")
    add_text(
        parser,
        "--data_jsonl_output_dir",
        default="jsonl_output",
        help="human-readable rows and report.json; must not exist yet",
    )
    add_text(
        parser,
        "--data_arrow_output_dir",
        default="arrow_output",
        help="tokenized rows for training; must not exist yet",
    )
    add_count(
        parser,
        "--max_length",
        "--max_len",
        default=4096,
        least=2,
        help="maximum tokens per row; longer conversations are cut after a complete round, longer "
        "documents (--type text) become several rows",
    )
    add_count(
        parser,
        "--num_spliced_dataset_bins",
        default=10,
        help="exact number of part-XXXXX shards",
    )
    add_count(
        parser,
        "--num_samples_per_datafile",
        default=-1,
        least=-1,
        help="randomly sample this many input rows for each shard; -1: all",
    )
    add_count(
        parser,
        "--seed",
        default=42,
        least=0,
        help="random seed of sampling and --eval_ratio",
    )
    add_count(parser, "--num_proc", help="worker processes; default: one per core")
    add_switch(
        parser,
        "--strict",
        help="stop at the first malformed row instead of dropping and reporting it",
    )
    add_number(
        parser,
        "--max_bad_ratio",
        unit="SHARE",
        default=DEFAULT_BAD_RATIO,
        most=1.0,
        help="stop without output if a larger fraction of the rows is malformed",
    )


def _add_evaluation_flags(parser: Parser) -> None:
    add_number(
        parser,
        "--eval_ratio",
        unit="SHARE",
        default=0.0,
        most=0.99,
        help="hold out this fraction of the rows, drawn with --seed, for evaluation; written to "
        "eval/ inside the outputs",
    )
    parser.add_argument(
        "--eval_input_dirs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="or prepare these inputs as the evaluation split (same syntax as --data_input_dirs)",
    )


def _add_cleaning_flags(parser: Parser) -> None:
    add_switch(
        parser,
        "--deduplicate",
        help="drop rows whose text repeats an earlier row's, ignoring case, character width and "
        "whitespace; of a training and an evaluation row the training row is dropped",
    )
    add_number(
        parser,
        "--near_duplicates",
        unit="SIMILARITY",
        exclusive=True,
        most=0.99,
        help="drop rows whose word trigrams have at least this Jaccard similarity with an "
        "earlier row's (MinHash LSH; try 0.8)",
    )
    add_switch(
        parser,
        "--drop_eval_overlap",
        help="drop training rows that share --overlap_words consecutive words with an evaluation "
        "row",
    )
    parser.add_argument(
        "--benchmark_files",
        nargs="+",
        default=[],
        metavar="PATH",
        help="drop training rows that share --overlap_words consecutive words with any text in "
        "these files (decontamination)",
    )
    add_count(
        parser,
        "--overlap_words",
        default=DEFAULT_OVERLAP_WORDS,
        least=2,
        help="consecutive words that count as an overlap",
    )
    add_count(
        parser,
        "--min_answer_chars",
        default=0,
        least=0,
        help="drop rows with shorter responses (sft: together)",
    )
    add_count(
        parser,
        "--max_answer_chars",
        help="drop rows with longer responses (sft: together)",
    )
    add_switch(
        parser,
        "--drop_trivial_answers",
        help="drop rows whose response is blank or repeats the prompt",
    )


def parse_prepare(argv: Sequence[str] | None = None, prog: str | None = None) -> PrepareSettings:
    """The checked flags; ``data_input_dirs`` is a list of paths. Exits with code 2 and one line
    naming a wrong flag."""
    parser = prepare_parser().named(prog)
    args = parser.parse_args(argv)
    for name in ("data_input_dirs", "eval_input_dirs", "benchmark_files"):
        setattr(
            args, name, [path for word in getattr(args, name) for path in word.split(",") if path]
        )
    if args.tokenizer_dir is None:
        parser.error("--tokenizer_dir is required: directory or hub name of the model's tokenizer")
    _check_template_name(parser, args)
    try:
        args.add_tokens = tokens_of(args.add_tokens)
    except ValueError as error:
        parser.error(str(error))
    try:
        args.columns = parse_columns(args.columns)
    except ValueError as error:
        parser.error(f"--columns: {error}")
    if args.check_template:
        return filled(PrepareSettings, vars(args))
    if args.type is None:
        parser.error(f"--type is required, what the rows are for: {', '.join(DATA_TYPES)}")
    if not args.data_input_dirs:
        parser.error("--data_input_dirs is required: the files or folders to read")
    if args.format not in (None, *FORMATS_OF[args.type]):
        readers = [type for type, formats in FORMATS_OF.items() if args.format in formats]
        # One that wants scores is named where nothing else reads them.
        types = " or ".join([r for r in readers if not DATA_TYPES[r].scored] or readers)
        parser.error(
            f"--format {args.format} is for --type {types}; --type {args.type} reads "
            f"{', '.join(FORMATS_OF[args.type])}"
        )
    if args.learn != LEARNED_TURNS[0] and args.type != "sft":
        learned = "every turn of the assistant" if args.type == "scored" else "the last response"
        parser.error(
            f"--learn {args.learn} is for --type sft; of --type {args.type} {learned} is learned"
        )
    if args.num_samples_per_datafile == 0:
        parser.error(
            "--num_samples_per_datafile 0 selects no rows; give a positive number, or -1 for all "
            "rows"
        )
    _check_type(parser, args)
    _check_together(parser, args)
    return filled(PrepareSettings, vars(args), length_given="max_length" in args._written)


def _check_template_name(parser: Parser, args: Namespace) -> None:
    try:
        named_template(args.conversation_template_config, may_be_new=True)
    except ValueError as error:
        parser.error(str(error))


def _check_type(parser: Parser, args: Namespace) -> None:
    """Refuse what rows of ``--type`` have no use for."""
    type = DATA_TYPES[args.type]
    if args.documents and "document" not in type.reads:
        parser.error(
            f"--documents says what of a .txt file is a document; rows of --type {args.type} are "
            "none"
        )
    if args.conversation_template_config and not type.templated:
        parser.error(
            f"--conversation_template_config does nothing with --type {args.type}, whose rows are "
            "written without a template"
        )


def _check_together(parser: Parser, args: Namespace) -> None:
    if args.eval_ratio and args.eval_input_dirs:
        parser.error(
            "--eval_ratio takes evaluation rows from the inputs, --eval_input_dirs reads them "
            "from other files; give one"
        )
    if args.drop_eval_overlap and not (args.eval_ratio or args.eval_input_dirs):
        parser.error(
            "--drop_eval_overlap needs evaluation rows: give --eval_ratio or --eval_input_dirs"
        )
    if args.max_answer_chars is not None and args.max_answer_chars < args.min_answer_chars:
        parser.error(
            f"--max_answer_chars {args.max_answer_chars} is below --min_answer_chars "
            f"{args.min_answer_chars}"
        )
