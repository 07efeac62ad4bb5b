"""The flags of ``prepare_dataset.py``."""

from argparse import Namespace
from collections.abc import Sequence

from coati.cli.parser import Parser
from coati.cli.program_settings import PrepareSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_switch, add_text
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import FORMATS, FORMATS_OF
from coati.dataset.rows.row_errors import DEFAULT_BAD_RATIO, DEFAULT_OVERLAP_WORDS, TEMPLATE_MODES

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
    """The parser of ``prepare_dataset.py``."""
    parser = Parser(
        prog="prepare_dataset.py",
        usage="%(prog)s --type TYPE --data_input_dirs PATH[,PATH ...] --tokenizer_dir MODEL "
        "[flags]",
        description="Raw rows to the tokenized shards that training reads, and a report of every "
        "row's fate.",
    )
    parser.add_argument("--type", choices=DATA_TYPES, help="what the rows are for (required)")
    parser.add_argument(
        "--data_input_dirs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="parted by commas or blanks: files (.jsonl .json .csv .tsv .txt, also .gz; .parquet), "
        "folders of them, directories of save_to_disk, or names of data sets on the hub "
        "(owner/name or owner/name:subset) (required)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="the format of every row; default: each row's is recognized by its keys",
    )
    add_text(
        parser, "--split", unit="NAME", help="part of a data set that has several; default: train"
    )
    parser.add_argument(
        "--tokenizer_dir",
        required=True,
        metavar="MODEL",
        help="directory or hub name of the tokenizer (required)",
    )
    add_switch(parser, "--trust_remote_code", help="run Python files that come with the tokenizer")
    _add_template_flags(parser)
    _add_output_flags(parser)
    _add_evaluation_flags(parser)
    _add_cleaning_flags(parser)
    return parser


def _add_template_flags(parser: Parser) -> None:
    add_text(
        parser,
        "--conversation_template_config",
        unit="FILE",
        help="template JSON (config/conversation_template/ has examples); where nothing is, the "
        "tokenizer's own template is written; default: the tokenizer's own",
    )
    parser.add_argument(
        "--template_mode",
        choices=TEMPLATE_MODES,
        default=TEMPLATE_MODES[0],
        help="a template that rewrites earlier assistant turns: make one row per turn, or refuse "
        "it",
    )
    add_switch(
        parser,
        "--check_template",
        help="print a probe dialogue as the template renders it, its supervised part marked, and "
        "all that is wrong with it; exit code 1 where training would be wrong; needs "
        "--tokenizer_dir alone",
    )


def _add_output_flags(parser: Parser) -> None:
    add_text(parser, "--data_cache_dir", default="cache", help="scratch space, emptied at the end")
    add_text(
        parser,
        "--data_jsonl_output_dir",
        default="jsonl_output",
        help="readable rows, report.json; must be new",
    )
    add_text(
        parser,
        "--data_arrow_output_dir",
        default="arrow_output",
        help="rows for training; must be new",
    )
    add_count(
        parser,
        "--max_length",
        "--max_len",
        default=4096,
        least=2,
        help="longest row in tokens; cut after rounds",
    )
    add_count(
        parser,
        "--num_spliced_dataset_bins",
        default=10,
        help="number of part-XXXXX shards, exactly",
    )
    add_count(
        parser,
        "--num_samples_per_datafile",
        default=-1,
        least=-1,
        help="take a random sample of this many input rows for each shard; -1: all",
    )
    add_count(
        parser, "--seed", default=42, least=0, help="of the random sample and of --eval_ratio"
    )
    add_count(parser, "--num_proc", help="processes; default: one per core")
    add_switch(
        parser,
        "--strict",
        help="end at the first malformed row instead of dropping and reporting it",
    )
    add_number(
        parser,
        "--max_bad_ratio",
        unit="SHARE",
        default=DEFAULT_BAD_RATIO,
        most=1.0,
        help="end without output when a larger share of the rows is malformed",
    )


def _add_evaluation_flags(parser: Parser) -> None:
    add_number(
        parser,
        "--eval_ratio",
        unit="SHARE",
        default=0.0,
        most=0.99,
        help="keep this share of the rows, drawn by --seed, for evaluation: they go to eval/ "
        "inside the outputs",
    )
    parser.add_argument(
        "--eval_input_dirs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="or prepare these inputs as the evaluation split (written as --data_input_dirs)",
    )


def _add_cleaning_flags(parser: Parser) -> None:
    add_switch(
        parser,
        "--deduplicate",
        help="drop rows whose text an earlier row has, case, width and white space aside; a "
        "training row like an evaluation row goes",
    )
    add_number(
        parser,
        "--near_duplicates",
        unit="SIMILARITY",
        exclusive=True,
        most=0.99,
        help="likewise rows whose word trigrams agree with an earlier row's to this share (0.8, "
        "say; MinHash LSH)",
    )
    add_switch(
        parser,
        "--drop_eval_overlap",
        help="drop training rows that share --overlap_words words in a row with an evaluation row",
    )
    parser.add_argument(
        "--benchmark_files",
        nargs="+",
        default=[],
        metavar="PATH",
        help="drop training rows that share --overlap_words words in a row with any text of these "
        "files",
    )
    add_count(
        parser,
        "--overlap_words",
        default=DEFAULT_OVERLAP_WORDS,
        least=2,
        help="length of what counts as shared",
    )
    add_count(
        parser,
        "--min_answer_chars",
        default=0,
        least=0,
        help="drop rows with shorter answers (sft: together)",
    )
    add_count(parser, "--max_answer_chars", help="drop rows with longer answers (sft: together)")
    add_switch(
        parser,
        "--drop_trivial_answers",
        help="drop rows with an answer that is blank or repeats the question",
    )


def parse_prepare(argv: Sequence[str] | None = None) -> PrepareSettings:
    """The checked flags; ``data_input_dirs`` is a list of paths. Exits with code 2 and one line
    naming a wrong flag."""
    parser = prepare_parser()
    args = parser.parse_args(argv)
    for name in ("data_input_dirs", "eval_input_dirs", "benchmark_files"):
        setattr(
            args, name, [path for word in getattr(args, name) for path in word.split(",") if path]
        )
    if args.check_template:
        return filled(PrepareSettings, vars(args))
    if args.type is None:
        parser.error(f"--type is required, what the rows are for: {', '.join(DATA_TYPES)}")
    if not args.data_input_dirs:
        parser.error("--data_input_dirs is required: the files or folders to read")
    if args.format not in (None, *FORMATS_OF[args.type]):
        types = " or ".join(type for type, formats in FORMATS_OF.items() if args.format in formats)
        parser.error(
            f"--format {args.format} is for --type {types}; --type {args.type} reads "
            f"{', '.join(FORMATS_OF[args.type])}"
        )
    if args.num_samples_per_datafile == 0:
        parser.error(
            "--num_samples_per_datafile 0 leaves nothing; give a positive number, or -1 for all "
            "rows"
        )
    _check_together(parser, args)
    return filled(PrepareSettings, vars(args))


def _check_together(parser: Parser, args: Namespace) -> None:
    if args.eval_ratio and args.eval_input_dirs:
        parser.error(
            "--eval_ratio takes evaluation rows from the inputs, --eval_input_dirs names others; "
            "give one"
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
