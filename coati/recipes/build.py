"""From flags to objects: process group, tokenizer, data, model, engine. The scripts are tables of
contents over this."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation, setup_conversation_template
from coati.dataset.load.epoch_order import EpochOrder
from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader, preparation_of
from coati.dataset.load.packing import PackCollator
from coati.models.block_mask import sliding_window
from coati.models.loading import (
    choose_attention,
    disable_dropout,
    load_causal_lm,
    load_config,
)
from coati.models.lora.adapter_files import load_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from coati.models.tokenizer import check_vocabulary, load_tokenizer
from coati.parallel.boost import boost, prepare_colossalai
from coati.parallel.checkpoint import RunningState, restore
from coati.parallel.engine import Engine
from coati.parallel.families import check_family
from coati.parallel.launch import launch, set_seed, warn_of_threads
from coati.parallel.plugin_checks import check_heads
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.parallel.weights import ModelAssets
from coati.recipes.data import epoch_plan, is_raw
from coati.recipes.defaults import check_precision, parallel_options
from coati.recipes.resume import Resume, check_same_model
from coati.trainer.global_batches import total_steps
from coati.trainer.schedule import RunSchedule
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger

logger = get_logger(__name__)


def start(args: Namespace) -> ParallelOptions:
    """Join the other processes and settle the defaults. Raises ValueError naming the flag."""
    # The group comes first: ColossalAI's import takes seconds that would count against the other
    # ranks' patience.
    launch(args.seed)
    warn_of_threads()
    options = parallel_options(args)
    check_precision(options.precision)
    prepare_colossalai()
    return options


def tokenizer_and_template(args: Namespace) -> tuple[Any, Conversation | None]:
    """The tokenizer, right-padding, and the conversation template it is used with: the flag's, the
    data's, its own."""
    tokenizer = load_tokenizer(
        args.tokenizer_dir or args.pretrain, trust_remote_code=args.trust_remote_code
    )
    tokenizer.padding_side = "right"
    prepared = [found for path in args.dataset if (found := preparation_of(path))]
    config = args.conversation_template_config
    if config is None and prepared:
        config = prepared[0]["conversation_template"]
    if config is None and tokenizer.chat_template is None and not any(map(is_raw, args.dataset)):
        logger.info(
            "the tokenizer has no chat template and the data do not say theirs: none is saved with "
            "the model"
        )
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
            f"--dataset was prepared with the tokenizer {made_with['path']} of "
            f"{made_with['vocab_size']} tokens, "
            f"--tokenizer_dir has {len(tokenizer)}; prepare the data with this model's tokenizer"
        )


def causal_lm(args: Namespace, options: ParallelOptions, tokenizer: Any, resume: Resume):
    """The model to train, with adapters when asked for. Raises ValueError before weights are loaded
    where it can."""
    return _model(args, options, tokenizer, resume, load_causal_lm)


def reward_model(args: Namespace, options: ParallelOptions, tokenizer: Any, resume: Resume):
    """The reward model to train: ``--pretrain`` with a new head if it has none, or a checkpoint
    with its head."""
    new_head = (
        resume.weights is None or options.lora
    )  # an adapter's files bring the head themselves
    model = _model(
        args,
        options,
        tokenizer,
        resume,
        partial(RewardModel.from_pretrained, new_head=new_head),
        dropout=False,
    )
    # It cancels in every pair, and Adam would make small steps of the rounding errors that are left
    # of its gradient. Gemini wants a gradient of every parameter.
    model.score.bias.requires_grad_(args.center_coef > 0 or PLUGINS[options.plugin].sharded_forward)
    return model


def policy(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    resume: Resume,
    load: Callable[..., Any] = load_causal_lm,
):
    """:func:`causal_lm` without dropout, whose noise would be learned as a difference to the
    reference."""
    return _model(args, options, tokenizer, resume, load, dropout=False)


def _model(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    resume: Resume,
    load: Callable[..., Any],
    dropout: bool = True,
):
    adapters = options.lora and resume.weights is not None
    source = args.pretrain if adapters or resume.weights is None else resume.weights
    if Path(source).is_dir() and (Path(source) / "config.json").is_file():
        config = load_config(source, trust_remote_code=args.trust_remote_code)
        check_heads(config, options)
        check_family(config, options)
        check_same_model(config, args)
    set_seed(args.seed)
    model = load(source, **loading(args, options))
    check_vocabulary(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    if options.lora:
        config = lora_config(args)
        model = apply_lora(model, config, seed=args.seed)
        if adapters:
            load_lora(model, resume.weights)
        if not dropout and (config.linear_lora_dropout or config.embedding_lora_dropout):
            logger.info(
                "LoRA's dropout is off here: its noise would be learned as a difference to the "
                "reference."
            )
    if not dropout:
        disable_dropout(model)
    return model


def loading(args: Namespace, options: ParallelOptions) -> dict[str, Any]:
    """Keywords of every loader, for a model that is to be trained."""
    return {
        "dtype": "fp32"
        if options.precision == "fp32" or PLUGINS[options.plugin].fp32_weights
        else "auto",
        "attn_implementation": attention(args, options),
        "trust_remote_code": args.trust_remote_code,
    }


def attention(args: Namespace, options: ParallelOptions) -> str:
    """``attn_implementation``: sequence parallelism of ColossalAI is right only with eager (or its
    own flash) attention."""
    import torch

    if options.enable_sequence_parallelism:
        return "eager"
    return choose_attention(args.use_flash_attn, options.precision, torch.cuda.is_available())


def lora_config(args: Namespace) -> LoraConfig:
    """``--lora_config`` with the flags that override it."""
    config = LoraConfig.from_file(args.lora_config) if args.lora_config else LoraConfig()
    flags = {
        "r": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "lora_train_bias": args.lora_train_bias,
    }
    return replace(config, **{name: value for name, value in flags.items() if value is not None})


def engine(
    args: Namespace, options: ParallelOptions, model: Any, rows: EpochOrder | int, resume: Resume
) -> Engine:
    """``model`` boosted, with schedule as long as the steps that will be taken, and put back to
    where a checkpoint was. ``rows``: of an epoch, or its plan."""
    window = args.batch_size * args.accumulation_steps * world_size() // options.model_parallel_size
    count = rows.count if isinstance(rows, EpochOrder) else lambda epoch: rows
    if options.packing and isinstance(rows, EpochOrder):
        check_window_of_attention(model.config, int(rows.lengths.max()))
    total = total_steps(
        resume.state or RunningState(), count, window, args.max_epochs, args.max_steps
    )
    built = boost(
        model,
        options,
        lr=args.lr,
        weight_decay=args.weight_decay,
        total_steps=max(total, 1),
        warmup_steps=args.warmup_steps,
        head_lr=getattr(args, "head_lr", None),
    )
    # Ranks that see other rows draw other dropout; those that share a copy of the data draw the
    # same.
    set_seed(args.seed + 1 + built.mesh.dp_rank)
    if resume.folder is not None:
        restore(resume.folder, built, resume.state)
    return built


def check_window_of_attention(config: Any, longest: int) -> None:
    """Refuse packs where a row is longer than what attention looks back: the mask of a pack does
    not say that too."""
    window = sliding_window(config)
    if window is not None and longest > window:
        raise ValueError(
            f"--packing: the longest row has {longest} tokens, this {config.model_type} model "
            f"looks back {window} at "
            f"most (sliding_window); use --max_length {window}, or drop --packing"
        )


def loaders(
    args: Namespace,
    built: Engine,
    train: Any,
    evaluation: Any,
    collate: Any,
    plan: EpochOrder | None = None,
    partners: bool = False,
):
    """The training windows and evaluation batches of this rank; evaluation rows are never packed.
    ``partners``: rows come with the response of another row, for KTO."""
    mesh: dict[str, Any] = {"dp_rank": built.mesh.dp_rank, "dp_size": built.mesh.dp_size}
    plan = plan or epoch_plan(args, train)
    windows = GlobalBatchLoader(
        train,
        PackCollator(collate) if plan.pack_length is not None else collate,
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation_steps,
        epoch_order=plan,
        partners=partners,
        **mesh,
    )
    if evaluation is None:
        return windows, None
    batch_size = args.eval_batch_size or args.batch_size
    return windows, EvaluationLoader(
        evaluation, collate, batch_size=batch_size, partners=partners, **mesh
    )


def plan(args: Namespace) -> RunSchedule:
    """When the run logs, evaluates, saves and ends."""
    return RunSchedule(
        args.save_dir,
        args.save_interval,
        args.keep_last_k,
        args.eval_interval,
        args.log_interval,
        args.max_steps,
        args.metric_for_best,
    )


def assets(model: Any, tokenizer: Any, template: Conversation | None) -> ModelAssets:
    """What is saved beside the weights; taken before boosting."""
    return ModelAssets.of(model, tokenizer, template.to_config() if template is not None else None)
