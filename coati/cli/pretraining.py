"""The flags of ``coati pretrain``."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from coati.cli import arguments as shared
from coati.cli.checks import check_offline, checked, requested_options
from coati.cli.lora_flags import add_lora_flags
from coati.cli.parser import OlderFlags, Parser
from coati.cli.prepare import add_documents_flag
from coati.cli.settings import SFTSettings, settings_of
from coati.cli.sft_flags import add_token_loss_flags
from coati.cli.streaming_flags import add_streaming_flags
from coati.dataset.rows.dataset_info import NAME as DATASET_INFO
from coati.dataset.rows.input_names import parse_input
from coati.dataset.rows.readers import kind_of
from coati.parallel.plugins import PLUGINS
from coati.utils.logging import get_logger

logger = get_logger(__name__)


def pretrain_parser() -> Parser:
    """The parser of ``coati pretrain``."""
    parser = Parser(
        prog="coati pretrain",
        usage="%(prog)s --pretrain MODEL --dataset PATH [PATH ...] [flags]",
        description="Continued pre-training: trains a causal language model on every token of "
        "plain texts, and on conversations mixed in.",
    )
    shared.add_model_flags(parser)
    group = shared.add_data_flags(parser)
    add_documents_flag(group)
    add_streaming_flags(parser)
    shared.add_packing_flag(parser)
    shared.add_parallel_flags(parser)
    shared.add_optimization_flags(parser)
    shared.add_embedding_lr_flag(parser)
    add_token_loss_flags(parser)
    shared.add_epoch_flags(parser)
    add_lora_flags(parser)
    shared.add_output_flags(parser)
    shared.add_logging_flags(parser)
    parser.set_defaults(packing=True, max_length=2048, max_epochs=1, lr=1e-5)
    return parser


def parse_pretrain(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> SFTSettings:
    """The checked flags of ``coati pretrain``; as :func:`coati.cli.arguments.parse_sft`."""
    parser = pretrain_parser().named(prog)
    args = checked(parser, argv, settle_packing, check_offline, check_documents, older=older)
    return settings_of(SFTSettings, args, parallel=requested_options(args))


def settle_packing(args: Namespace) -> None:
    """Packs are the default where they are possible; what was asked for stays, to be refused."""
    if "packing" in args._written:
        return
    own_attention = args.use_flash_attn and args.plugin and PLUGINS[args.plugin].own_attention
    if args.enable_sequence_parallelism or own_attention:
        args.packing = False
        why = "--use_flash_attn" if own_attention else "--enable_sequence_parallelism"
        logger.info(f"rows are not packed here: {why} takes padding masks only.")


def check_documents(args: Namespace) -> None:
    """Refuse ``--documents`` where no path can have a .txt file."""
    if not args.documents:
        return
    paths = [Path(parse_input(path).base) for path in (*args.dataset, *args.eval_dataset)]
    texts = any(
        kind_of(path) == ".txt"
        or path.name == DATASET_INFO
        or (path.is_dir() and any(kind_of(one) == ".txt" for one in path.rglob("*.txt*")))
        for path in paths
    )
    if not texts:
        raise ValueError(
            f"--documents {args.documents} says what of a .txt file is a document, and there is "
            f"none among {' '.join(map(str, paths))}"
        )
