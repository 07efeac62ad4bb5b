"""From flags to objects: process group, tokenizer, data, model, engine. The scripts are tables of contents over
this."""

import hashlib
import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from coati.cli.machine import check_precision, parallel_options
from coati.cli.restart import Resume, check_same_model, pack_length
from coati.dataset.conversation import Conversation, setup_conversation_template
from coati.dataset.loader import (
    EvaluationLoader,
    WindowLoader,
    check_window,
    load_tokenized_dataset,
    preparation_of,
    row_lengths,
)
from coati.dataset.order import EpochPlan, Mixture
from coati.dataset.packing import PackCollator
from coati.dataset.prepare import prepare_dataset
from coati.models.block_mask import sliding_window
from coati.models.lora import LoraConfig, apply_lora
from coati.models.lora_files import load_lora
from coati.models.utils import check_vocabulary, choose_attention, load_causal_lm, load_config, load_tokenizer
from coati.parallel.boost import boost, prepare_colossalai
from coati.parallel.checkpoint import RunningState, restore
from coati.parallel.engine import Engine
from coati.parallel.families import check_family
from coati.parallel.launch import launch, set_seed, warn_of_threads
from coati.parallel.plugins import ParallelOptions, check_heads
from coati.parallel.weights import ModelAssets
from coati.trainer.windows import total_steps
from coati.utils.distributed import all_gather_object, is_rank_0, world_size
from coati.utils.notice import say

RAW_SUFFIXES = (".json", ".jsonl", ".parquet", ".gz")


def start(args: Namespace) -> ParallelOptions:
    """Join the other processes and settle the defaults. Raises ValueError naming the flag."""
    # The group comes first: ColossalAI's import takes seconds that would count against the other ranks' patience.
    launch(args.seed)
    warn_of_threads()
    options = parallel_options(args)
    check_precision(options.precision)
    prepare_colossalai()
    return options


def tokenizer_and_template(args: Namespace) -> tuple[Any, Conversation | None]:
    """The tokenizer, right-padding, and the conversation template it is used with: the flag's, the data's, its own."""
    tokenizer = load_tokenizer(args.tokenizer_dir or args.pretrain, trust_remote_code=args.trust_remote_code)
    tokenizer.padding_side = "right"
    prepared = [found for path in args.dataset if (found := preparation_of(path))]
    config = args.conversation_template_config
    if config is None and prepared:
        config = prepared[0]["conversation_template"]
    if config is None and tokenizer.chat_template is None and not any(map(is_raw, args.dataset)):
        say("the tokenizer has no chat template and the data do not say theirs: none is saved with the model")
        return tokenizer, None
    template = setup_conversation_template(tokenizer, config, save_path=None)
    tokenizer.chat_template = template.chat_template
    for found in prepared:
        _check_same_vocabulary(tokenizer, found)
    return tokenizer, template


def _check_same_vocabulary(tokenizer: Any, prepared: dict[str, Any]) -> None:
    made_with = prepared["tokenizer"]
    if made_with["vocab_size"] != len(tokenizer):
        raise ValueError(
            f"--dataset was prepared with the tokenizer {made_with['path']} of {made_with['vocab_size']} tokens, "
            f"--tokenizer_dir has {len(tokenizer)}; prepare the data with this model's tokenizer"
        )


def is_raw(path: str) -> bool:
    """Whether ``path`` is a file (or a folder) of conversations that still has to be prepared."""
    folder = Path(path)
    if folder.is_file():
        return True
    prepared = (folder / "dataset_info.json", folder / "dataset_dict.json")
    return (
        not any(f.exists() for f in prepared)
        and any(f.suffix in RAW_SUFFIXES for f in folder.rglob("*"))
        and not any(folder.glob("part-*"))
    )


def dataset(paths: list[str], args: Namespace, tokenizer: Any, template: Conversation | None, mode: str = "train"):
    """The prepared rows of ``paths``; raw files among them are prepared into a cache first."""
    ready = [_prepare_raw(path, args, tokenizer, template) if is_raw(path) else path for path in paths]
    rows = load_tokenized_dataset(ready, mode)
    if rows is None:
        return None
    if mode == "train" and args.dataset_weights:
        args._dataset_sizes = [len(load_tokenized_dataset(path, mode)) for path in ready]
    if mode == "train" and args.max_samples:
        rows = rows.select(range(min(args.max_samples, len(rows))))
    largest = max((max(row) for row in rows[: min(len(rows), 256)]["input_ids"]), default=0)
    if largest >= len(tokenizer):
        raise ValueError(
            f"--dataset {paths[0]} holds token id {largest}, the tokenizer has {len(tokenizer)} tokens; prepare "
            "the data "
            "with this model's tokenizer"
        )
    return rows


def _prepare_raw(path: str, args: Namespace, tokenizer: Any, template: Conversation) -> str:
    files = sorted(f for f in Path(path).rglob("*") if f.is_file()) if Path(path).is_dir() else [Path(path)]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    key = json.dumps([stamps, vocabulary, template.to_config(), args.max_length])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "coati" / "prepared" / hashlib.sha256(key.encode()).hexdigest()[:24]
    failure = None
    if not (folder / "preparation.json").exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{path} holds raw conversations: preparing them into {folder} (prepare_dataset.py does this once for all)")
        try:
            prepare_dataset(
                inputs=[path],
                tokenizer=tokenizer,
                template=template,
                arrow_dir=folder,
                max_length=args.max_length,
                num_bins=1,
                tokenizer_name=args.tokenizer_dir or args.pretrain,
                seed=args.seed,
                show=print if is_rank_0() else None,
            )
        except (ValueError, OSError) as error:
            failure = str(error)
    # The others wait here: they must end with it, not hang.
    if failures := [text for text in all_gather_object(failure) if text]:
        raise ValueError(failures[0])
    return str(folder)


def epoch_plan(args: Namespace, rows: Any) -> EpochPlan:
    """The order of the training rows of :func:`dataset`: mixed by ``--dataset_weights``, packed by ``--packing``."""
    mixture = None
    if args.dataset_weights:
        mixture = Mixture(tuple(args.dataset), tuple(args._dataset_sizes), tuple(args.dataset_weights))
    return EpochPlan(row_lengths(rows), seed=args.seed, mixture=mixture, pack_length=pack_length(args))


def check_rows(args: Namespace, options: ParallelOptions, rows: Any) -> None:
    """Refuse fewer ``rows`` (or packs of an :class:`EpochPlan`) than one step needs before a model is loaded."""
    plan = rows if isinstance(rows, EpochPlan) else epoch_plan(args, rows)
    check_window(plan, args.batch_size, args.accumulation_steps, world_size() // options.model_parallel_size)
    if plan.mixture is not None:
        say(plan.mixture.describe())
    if plan.pack_length is not None:
        say(plan.describe_packing(args.batch_size))


def causal_lm(args: Namespace, options: ParallelOptions, tokenizer: Any, resume: Resume):
    """The model to train, with adapters when asked for. Raises ValueError before weights are loaded where it can."""
    adapters = options.lora and resume.weights is not None
    source = args.pretrain if adapters or resume.weights is None else resume.weights
    if Path(source).is_dir() and (Path(source) / "config.json").is_file():
        config = load_config(source, trust_remote_code=args.trust_remote_code)
        check_heads(config, options)
        check_family(config, options)
        check_same_model(config, args)
    set_seed(args.seed)
    model = load_causal_lm(
        source,
        dtype="fp32" if options.precision == "fp32" or options.plugin == "ddp" else "auto",
        attn_implementation=attention(args, options),
        trust_remote_code=args.trust_remote_code,
    )
    check_vocabulary(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    if options.lora:
        config = lora_config(args)
        model = apply_lora(model, config, seed=args.seed)
        if adapters:
            load_lora(model, resume.weights)
    return model


def attention(args: Namespace, options: ParallelOptions) -> str:
    """``attn_implementation``: sequence parallelism of ColossalAI is right only with eager (or its own flash)
    attention."""
    import torch

    if options.enable_sequence_parallelism:
        return "eager"
    return choose_attention(args.use_flash_attn, options.precision, torch.cuda.is_available())


def lora_config(args: Namespace) -> LoraConfig:
    """``--lora_config`` with the flags that override it."""
    config = LoraConfig.from_file(args.lora_config) if args.lora_config else LoraConfig()
    flags = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_train_bias": args.lora_train_bias}
    return replace(config, **{name: value for name, value in flags.items() if value is not None})


def engine(
    args: Namespace, options: ParallelOptions, model: Any, rows: EpochPlan | int, resume: Resume
) -> Engine:
    """``model`` boosted, with schedule as long as the steps that will be taken, and put back to where a checkpoint
    was. ``rows``: of an epoch, or its plan."""
    window = args.batch_size * args.accumulation_steps * world_size() // options.model_parallel_size
    count = rows.count if isinstance(rows, EpochPlan) else lambda epoch: rows
    if options.packing:
        check_window_of_attention(model.config, int(rows.lengths.max()))
    total = total_steps(resume.state or RunningState(), count, window, args.max_epochs, args.max_steps)
    built = boost(
        model,
        options,
        lr=args.lr,
        weight_decay=args.weight_decay,
        total_steps=max(total, 1),
        warmup_steps=args.warmup_steps,
    )
    # Ranks that see other rows draw other dropout; those that share a copy of the data draw the same.
    set_seed(args.seed + 1 + built.mesh.dp_rank)
    if resume.folder is not None:
        restore(resume.folder, built, resume.state)
    return built


def check_window_of_attention(config: Any, longest: int) -> None:
    """Refuse packs where a row is longer than what attention looks back: the mask of a pack does not say that too."""
    window = sliding_window(config)
    if window is not None and longest > window:
        raise ValueError(
            f"--packing: the longest row has {longest} tokens, this {config.model_type} model looks back {window} at "
            f"most (sliding_window); use --max_length {window}, or drop --packing"
        )


def loaders(
    args: Namespace, built: Engine, train: Any, evaluation: Any, collate: Any, plan: EpochPlan | None = None
):
    """The training windows and evaluation batches of this rank; evaluation rows are never packed."""
    mesh = {"dp_rank": built.mesh.dp_rank, "dp_size": built.mesh.dp_size}
    plan = plan or epoch_plan(args, train)
    windows = WindowLoader(
        train,
        PackCollator(collate) if plan.pack_length is not None else collate,
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation_steps,
        plan=plan,
        **mesh,
    )
    if evaluation is None:
        return windows, None
    return windows, EvaluationLoader(evaluation, collate, batch_size=args.eval_batch_size or args.batch_size, **mesh)


def assets(model: Any, tokenizer: Any, template: Conversation | None) -> ModelAssets:
    """What is saved beside the weights; taken before boosting."""
    return ModelAssets.of(model, tokenizer, template.to_config() if template is not None else None)
