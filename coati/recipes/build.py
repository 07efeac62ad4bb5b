"""From a run to its parts: model, engine, loaders."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from coati.cli.lora_flags import TARGETS, read_targets
from coati.cli.settings import (
    LoraSettings,
    RMSettings,
    SLSettings,
    TrainingSettings,
)
from coati.dataset.load.epoch_order import EpochOrder
from coati.models import ilql_heads
from coati.models.added_tokens import grow_embeddings, vocabulary_modules
from coati.models.attention_choice import choose_attention
from coati.models.base import BaseModel
from coati.models.block_mask import sliding_window
from coati.models.head import head_unsupported
from coati.models.loading import (
    disable_dropout,
    load_causal_lm,
    load_config,
)
from coati.models.lora.adapter_files import load_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from coati.models.scoring_padding import scoring_tokenizer
from coati.models.tokenizer import check_vocabulary
from coati.parallel.boost import boost
from coati.parallel.checkpoint import RunningState, restore
from coati.parallel.engine import Engine
from coati.parallel.families import check_family
from coati.parallel.inference_model import InferenceModel, boost_for_inference
from coati.parallel.launch import set_seed
from coati.parallel.optimizer import OptimizerSettings
from coati.parallel.optimizer_state import random_state, set_random_state
from coati.parallel.plugin_checks import check_heads
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.parallel.weights import ModelAssets
from coati.recipes.resume import check_same_model
from coati.recipes.run import Run
from coati.recipes.run_dir import refuse_shorter
from coati.recipes.streaming import EndlessOrder, epochs
from coati.trainer.global_batches import total_steps
from coati.utils.logging import get_logger
from coati.utils.phases import phase
from coati.utils.transformers_compat import masks_packs_itself, text_config

logger = get_logger(__name__)


@dataclass(frozen=True)
class Trained:
    """A model that is trained, and what is saved beside its weights."""

    engine: Engine
    assets: ModelAssets


def causal_lm(run: Run) -> Any:
    """The model to train, with adapters when asked for. Raises ValueError before weights are loaded
    where it can."""
    return load_model(run, load_causal_lm)


def policy(run: Run, load: Callable[..., Any] = load_causal_lm) -> Any:
    """:func:`causal_lm` without dropout, whose noise would be learned as a difference to the
    reference."""
    return load_model(run, load, dropout=False)


def policy_with_values(run: Run[SLSettings]) -> Any:
    """:func:`policy` with ILQL's heads: those of the checkpoint or of ``--pretrain``, else new
    ones. Raises ValueError for a model that they cannot stand on, and a checkpoint without them."""
    model = policy(run)
    source = run.resume.weights or run.settings.model.pretrain
    if reason := head_unsupported(model.config):
        raise ValueError(
            f"--pretrain {run.settings.model.pretrain}: {reason}, while ILQL's decoding adds "
            "values to the log-probs that its output embedding gives; choose another family"
        )
    if run.resume.folder is not None and ilql_heads.saved_file(source) is None:
        raise ValueError(
            f"--checkpoint_path {run.resume.folder}: {source} has no {ilql_heads.FILE}, ILQL's "
            "heads; it was not written by coati ilql, or the file was lost"
        )
    ilql_heads.attach(model, source, run.settings.seed)
    return model


def reward_model(run: Run[RMSettings]) -> Any:
    """The reward model to train: ``--pretrain`` with a new head if it has none, or a checkpoint
    with its head."""
    # An adapter's files bring the head themselves.
    new_head = run.resume.weights is None or run.options.lora
    load = partial(RewardModel.from_pretrained, new_head=new_head)
    model = load_model(run, load, dropout=False)
    # It cancels in every pair, and Adam would make small steps of the rounding errors that are left
    # of its gradient. Gemini wants a gradient of every parameter.
    centered = run.settings.loss.center_coef > 0
    model.score.bias.requires_grad_(centered or PLUGINS[run.options.plugin].sharded_forward)
    return model


@phase("loading the model")
def load_model(run: Run, load: Callable[..., Any], dropout: bool = True) -> Any:
    """What ``load`` makes of the run's start, checked, with adapters when asked for."""
    model_settings = run.settings.model
    resume = run.resume
    adapters = run.options.lora and resume.weights is not None
    source = model_settings.pretrain if adapters else resume.weights or model_settings.pretrain
    if Path(source).is_dir() and (Path(source) / "config.json").is_file():
        config = load_config(source, trust_remote_code=model_settings.trust_remote_code)
        check_heads(config, run.options)
        check_family(config, run.options)
        check_same_model(config, run.settings)
    set_seed(run.settings.seed)
    model = load(source, **loading(run))
    if source == model_settings.pretrain:
        grow_embeddings(model, run.tokenizer, run.added_tokens)
    check_vocabulary(model, run.tokenizer)
    if isinstance(model, BaseModel):  # a classifier for transformers, which needs to know it
        model.config.pad_token_id = run.tokenizer.pad_token_id
        if source != model_settings.pretrain:
            base = load_config(model_settings.pretrain, model_settings.trust_remote_code)
            model.train_padding(getattr(text_config(base), "pad_token_id", None))
    if run.options.lora:
        lora = _with_vocabulary(run, model, lora_config(run.settings.lora))
        model = apply_lora(model, lora, seed=run.settings.seed)
        if adapters:
            load_lora(model, resume.weights)
        if not dropout and (lora.linear_lora_dropout or lora.embedding_lora_dropout):
            logger.info(
                "LoRA's dropout is off here: its noise would be learned as a difference to the "
                "reference."
            )
    if not dropout:
        disable_dropout(model)
    return model


def _with_vocabulary(run: Run, model: Any, lora: LoraConfig) -> LoraConfig:
    """``lora`` with embedding and head trained whole where tokens were added, whose rows nothing
    else would train. Raises ValueError where they are split over processes."""
    whole = list(lora.modules_to_save or [])
    if run.added_tokens:
        whole += [name for name in vocabulary_modules(model) if name not in whole]
    if whole and run.options.tp > 1:
        flag = "--add_tokens" if run.added_tokens else "--lora_config modules_to_save"
        raise ValueError(
            f"{flag} with LoRA: modules that are trained whole cannot be split over --tp "
            f"{run.options.tp} processes; use --tp 1 (--plugin zero2), or train without LoRA"
        )
    return replace(lora, modules_to_save=whole or None)


def loading(run: Run) -> dict[str, Any]:
    """Keywords of every loader, for a model that is to be trained."""
    fp32 = run.options.precision == "fp32" or PLUGINS[run.options.plugin].fp32_weights
    return {
        "dtype": "fp32" if fp32 else "auto",
        "attn_implementation": attention(run),
        "trust_remote_code": run.settings.model.trust_remote_code,
        "quantize_base": run.settings.lora.quantize_base,
    }


def attention(run: Run) -> str:
    """``attn_implementation``: sequence parallelism of ColossalAI is right only with eager (or its
    own flash) attention."""
    if run.options.enable_sequence_parallelism:
        return "eager"
    flash = run.settings.model.use_flash_attn
    return choose_attention(flash, run.options.precision, torch.cuda.is_available())


@phase("loading a model that only responds or scores")
def frozen(
    options: ParallelOptions, load: Callable[[], Any], offload: bool = False
) -> InferenceModel:
    """The model that ``load`` returns, without dropout, only run forward. A resumed run goes on
    with the random numbers it had, whatever loading draws."""
    state = random_state()
    model = load()
    disable_dropout(model)
    engine = boost_for_inference(model, options)
    set_random_state(state)
    return InferenceModel(engine, offload=offload)


def collator(run: Run[TrainingSettings], kind: Callable[..., Any]) -> Any:
    """A collator of class ``kind`` for tokenized rows."""
    data = run.settings.data
    return kind(
        run.tokenizer,
        data.max_length,
        apply_loss_mask=not data.disable_loss_mask,
        pad_to_multiple_of=run.options.sequence_multiple,
    )


class DataParallelShare(TypedDict):
    """Which rows of a global batch a process reads: keywords of the loaders."""

    dp_rank: int
    dp_size: int


def dp_share(engine: Engine) -> DataParallelShare:
    """The share of this process."""
    return DataParallelShare(dp_rank=engine.mesh.dp_rank, dp_size=engine.mesh.dp_size)


def lora_config(lora: LoraSettings) -> LoraConfig:
    """``--lora_config`` with the flags that override it."""
    config = LoraConfig.from_file(lora.lora_config) if lora.lora_config else LoraConfig()
    flags: dict[str, Any] = {
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_train_bias": lora.lora_train_bias,
        "lora_experts": lora.lora_experts or None,
        "use_dora": lora.use_dora or None,
        "use_rslora": lora.use_rslora or None,
        "quantize_base": lora.quantize_base,
    }
    if lora.lora_target is not None:
        word = lora.lora_target in TARGETS
        target = lora.lora_target if word else read_targets(lora.lora_target)
        config = replace(config, target_modules=target)
    return replace(config, **{name: value for name, value in flags.items() if value is not None})


def assets(run: Run, model: Any) -> ModelAssets:
    """What is saved beside the weights; taken before boosting."""
    template = None if run.template is None else run.template.to_config()
    tokenizer = run.tokenizer
    if getattr(model.config, "coati_head", None) == RewardModel.kind:
        rows = model.get_input_embeddings().weight.shape[0]
        tokenizer, pad = scoring_tokenizer(tokenizer, rows, _ends(run))
        # Of an adapter this is not saved, but the config serves whoever loads the base with it.
        model.config.pad_token_id = tokenizer.pad_token_id if pad is None else pad
    return ModelAssets.of(model, tokenizer, template)


def _ends(run: Run) -> set[int]:
    """Ids that a row may end with: those of a dialogue under the template, and of its end."""
    if run.template is None:
        return set()
    texts = zip(("user", "assistant", "user"), "abc", strict=True)
    dialogue = [{"role": role, "content": text} for role, text in texts]
    stops = {token for stop in run.template.stop_ids for token in stop}
    return stops | set(run.template.encode_prompt(dialogue).input_ids)


def boosted(
    run: Run, model: Any, optimizer: OptimizerSettings, total_steps: int, part: str | None = None
) -> Engine:
    """``model`` boosted, with a schedule of ``total_steps``, and restored from the checkpoint.

    ``part``: its name in the checkpoint of a run that trains several models.
    """
    engine = boost(model, run.options, optimizer=optimizer, total_steps=max(total_steps, 1))
    # Ranks that see other rows draw other numbers; those that share a copy of the data draw the
    # same.
    set_seed(run.settings.seed + 1 + engine.mesh.dp_rank)
    if run.resume.folder is not None:
        restore(run.resume.folder / (part or ""), engine, run.resume.state)
    return engine


def sl_engine(run: Run[SLSettings], model: Any, order: EpochOrder | EndlessOrder) -> Engine:
    """The engine of a trainer on fixed data; the schedule is as long as the steps that will be
    taken."""
    settings = run.settings
    if run.options.packing and not masks_packs_itself():
        check_sliding_window(model.config, int(order.lengths.max()))
    batches = settings.batches
    global_batch = batches.batch_size * batches.accumulation_steps * run.data_parallel_size
    state = run.resume.state or RunningState()
    max_steps = settings.schedule.max_steps
    total = total_steps(state, order.count, global_batch, epochs(settings), max_steps)
    refuse_shorter(settings.output, total)
    return boosted(run, model, settings.optimizer, total)


def check_sliding_window(config: Any, longest: int) -> None:
    """Refuse packs where a row is longer than what attention looks back: the mask of a pack does
    not say that too."""
    window = sliding_window(config)
    if window is not None and longest > window:
        raise ValueError(
            f"--packing: the longest row has {longest} tokens, this {config.model_type} model "
            f"looks back {window} at most (sliding_window); use --max_length {window}, or drop "
            "--packing"
        )
