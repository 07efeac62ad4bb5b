"""The flags of coati sft, in groups that the parsers of all training scripts share."""

import argparse
from collections.abc import Sequence

from coati.cli.checks import check_offline, checked, requested_options
from coati.cli.launch_flags import add_launch_flags
from coati.cli.lora_flags import add_lora_flags
from coati.cli.model_flags import add_trust_flag
from coati.cli.optimization_flags import add_embedding_lr_flag, add_optimization_flags
from coati.cli.output_flags import add_logging_flags, add_output_flags
from coati.cli.parser import OlderFlags, Parser
from coati.cli.row_flags import add_column_flags, add_learn_flag, add_row_flags
from coati.cli.settings import SFTSettings, settings_of
from coati.cli.sft_flags import add_token_loss_flags
from coati.cli.streaming_flags import add_streaming_flags
from coati.cli.values import add_count, add_number, add_switch, add_text, number, table
from coati.models.kernels import AUTO, KERNELS
from coati.parallel.plugins import PLUGINS, PRECISIONS, SP_MODES


def sft_parser() -> Parser:
    """The parser of ``coati sft``."""
    parser = Parser(
        prog="coati sft",
        usage="%(prog)s --pretrain MODEL --dataset PATH [PATH ...] [flags]",
        description="Supervised fine-tuning: trains a causal language model on the assistant's "
        "turns of conversations.",
    )
    add_model_flags(parser)
    add_data_flags(parser, learn=True)
    add_streaming_flags(parser)
    add_packing_flag(parser)
    add_parallel_flags(parser)
    add_optimization_flags(parser)
    add_embedding_lr_flag(parser)
    add_token_loss_flags(parser)
    add_epoch_flags(parser)
    add_lora_flags(parser)
    add_output_flags(parser)
    add_logging_flags(parser)
    return parser


def parse_sft(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> SFTSettings:
    """The checked flags of ``coati sft``; exits with code 2 and one line naming the flag when
    something is wrong.

    What follows the machine stays None (``plugin``, ``parallel.precision``). ``older``: flags of
    earlier releases that are taken too. ``prog``: what messages call the program. Neither torch
    nor transformers is imported.
    """
    args = checked(sft_parser().named(prog), argv, check_offline, older=older)
    return settings_of(SFTSettings, args, parallel=requested_options(args))


def add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add_text(
        group,
        "--pretrain",
        unit="MODEL",
        help="model to start from: Hugging Face directory or hub name (required)",
    )
    add_text(group, "--tokenizer_dir", help="tokenizer directory or hub name; default: --pretrain")
    add_tokens_flag(group)
    add_text(
        group,
        "--checkpoint_path",
        unit="DIR or auto",
        help="checkpoint to resume from (an epoch-E_step-S directory; a `modeling` directory gives "
        "its weights alone); auto: the newest complete checkpoint in --save_dir, if there is one",
    )
    add_switch(
        group,
        "--checkpoint_weights_only",
        help="load only the weights of --checkpoint_path: optimizer, schedule and sample order "
        "start anew",
    )
    group.add_argument(
        "--mixed_precision",
        choices=PRECISIONS,
        help="precision of the forward and backward pass; default: bf16 on a GPU that has it, fp32 "
        "on a CPU",
    )
    add_switch(
        group,
        "--grad_checkpoint",
        help="gradient checkpointing: recompute activations in the backward pass, for less memory "
        "and more time",
    )
    add_switch(
        group,
        "--offload_activations",
        help="--grad_checkpoint: the inputs of the layers, which it keeps, wait for the backward "
        "pass in host memory",
    )
    add_switch(
        group,
        "--use_flash_attn",
        help="flash-attn where it is installed, PyTorch's fused attention elsewhere",
    )
    group.add_argument(
        "--kernels",
        choices=tuple(KERNELS),
        default=AUTO,
        help=table("what computes norms, rotary embeddings and gated layers", KERNELS),
    )
    add_trust_flag(group)


def add_tokens_flag(parser: Parser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--add_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens to add to the tokenizer, as '<think>' '</think>', or .txt files of them, one "
        "a line; their rows of embedding and head start as the mean of the others, and with LoRA "
        "both are trained whole",
    )


def add_data_flags(parser: Parser, learn: bool = False) -> argparse._ArgumentGroup:
    """``learn``: whether it can be chosen which turns are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="training data: directories written by coati prepare, or raw json, jsonl or "
        "parquet files, which are prepared into a cache first (required)",
    )
    group.add_argument(
        "--dataset_weights",
        nargs="+",
        type=number(0, exclusive=True),
        default=[],
        metavar="W",
        help="sampling weights of the mixture, one for each path of --dataset; an epoch has as "
        "many rows as all paths together; default: every row once an epoch",
    )
    group.add_argument(
        "--eval_dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="evaluation data, in the same forms",
    )
    add_eval_ratio_flag(group, "--dataset", "--eval_dataset")
    add_column_flags(group, "raw rows: ")
    add_template_flag(group)
    if learn:
        add_learn_flag(group)
    add_count(
        group,
        "--max_length",
        "--max_len",
        default=512,
        unit="TOKENS",
        least=2,
        help="longest row; longer ones are truncated",
    )
    add_count(group, "--max_samples", help="use the first N rows of --dataset; default: all")
    add_switch(
        group,
        "--disable_loss_mask",
        help="train on every token, not only on the assistant's turns",
    )
    return group


def add_template_flag(group: argparse._ArgumentGroup) -> None:
    add_text(
        group,
        "--conversation_template_config",
        unit="FILE",
        help="conversation template (JSON, or the name of one that comes with coati) for raw files "
        "and for the final model; default: the one the data was prepared with, else the "
        "tokenizer's own",
    )
    add_row_flags(group)


def add_packing_flag(parser: Parser) -> None:
    add_switch(
        parser.add_argument_group("packing"),
        "--packing",
        help="pack several samples per sequence of --max_length tokens, without "
        "cross-contamination; --batch_size then counts packs",
    )


def add_parallel_flags(parser: Parser) -> None:
    group = parser.add_argument_group("parallelism")
    group.add_argument(
        "--plugin",
        choices=tuple(PLUGINS),
        help="ColossalAI plugin (docs/plugins.md); default: 3d with --tp, --pp or --sp, gemini "
        "with several GPUs, a compiler and no LoRA, ddp with one process on a CPU, else zero2",
    )
    add_count(group, "--tp", default=1, help="tensor parallel size")
    add_count(group, "--pp", default=1, help="pipeline parallel size")
    add_count(group, "--sp", default=1, help="sequence parallel size (all_to_all)")
    add_switch(
        group,
        "--enable_sequence_parallelism",
        help="split each sequence over processes (--plugin 3d)",
    )
    group.add_argument(
        "--sp_mode",
        choices=SP_MODES,
        default="split_gather",
        help="sequence parallelism: split_gather and ring over the --tp processes, all_to_all over "
        "--sp",
    )
    group.add_argument(
        "--zero_stage",
        type=int,
        choices=(0, 1, 2, 3),
        default=0,
        help="--plugin 3d: shard optimizer states (1), gradients too (2); 3 means --plugin gemini "
        "with --tp",
    )
    add_switch(
        group,
        "--zero_cpu_offload",
        help="--plugin 3d: keep the sharded optimizer states in host memory",
    )
    add_count(
        group,
        "--microbatch_size",
        default=1,
        unit="ROWS",
        help="rows per pipeline micro-batch (--pp above 1)",
    )
    add_text(
        group,
        "--plugin_args",
        unit="FILE",
        help="JSON object with further keywords of the ColossalAI plugin",
    )
    add_launch_flags(parser)


def add_epoch_flags(parser: Parser) -> None:
    group = parser.add_argument_group("batches and epochs")
    add_count(group, "--max_epochs", default=3, help="training epochs")
    add_count(
        group,
        "--max_steps",
        unit="STEPS",
        help="stop after this many optimizer steps; default: all epochs",
    )
    add_count(
        group, "--batch_size", default=4, unit="ROWS", help="rows per micro-batch and process"
    )
    add_count(
        group,
        "--eval_batch_size",
        unit="ROWS",
        help="rows per evaluation batch; default: --batch_size",
    )
    add_count(
        group,
        "--eval_interval",
        unit="STEPS",
        least=0,
        help="optimizer steps between evaluations, 0: only before and after training; default: "
        "once per epoch",
    )


def add_eval_ratio_flag(group: argparse._ArgumentGroup, rows: str, other: str) -> None:
    """``rows``: the flag of the rows that are split; ``other``: the one of evaluation rows."""
    add_number(
        group,
        "--eval_ratio",
        unit="R",
        exclusive=True,
        most=0.5,
        help=f"evaluate on this share of {rows}, drawn by --seed, and train on the rest; rows of "
        f"one prompt stay together. Not with {other}",
    )
