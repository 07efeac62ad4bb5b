"""The four models of PPO (two of GRPO, or three) as engines: where each starts, and what it has to
share with the others."""

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from coati.cli.rollout_checks import check_ids
from coati.dataset.chat.conversation import Conversation
from coati.models.base import BaseModel, without_head
from coati.models.critic import Critic
from coati.models.loading import (
    adapter_base,
    disable_dropout,
    find_model,
    is_bare,
    load_causal_lm,
    load_config,
    load_configuration,
)
from coati.models.lora.adapter_files import SETTINGS, load_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from coati.models.scalar_loading import load_scalar_weights
from coati.models.tokenizer import check_vocabulary, load_tokenizer
from coati.parallel.boost import boost
from coati.parallel.checkpoint import restore
from coati.parallel.engine import Engine
from coati.parallel.families import check_family
from coati.parallel.inference_model import InferenceModel, boost_for_inference
from coati.parallel.launch import set_seed
from coati.parallel.optimizer_state import random_state, set_random_state
from coati.parallel.plugin_checks import check_heads
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.parallel.weights import ModelAssets
from coati.recipes import build
from coati.recipes import reference_model as references
from coati.recipes.resume import Resume
from coati.utils.logging import get_logger

logger = get_logger(__name__)

SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Start:
    """Where a scalar model comes from: ``flag`` named ``path``. ``new_head``: it may lack one.
    ``architecture``: where the configuration is, if not there. ``trained``: it is this run's own
    earlier state."""

    flag: str
    path: str
    new_head: bool = False
    architecture: str | None = None
    trained: bool = False


def actor_engine(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    resume: Resume,
    total_steps: int,
    template: Conversation | None = None,
) -> tuple[Engine, ModelAssets]:
    """The policy, without dropout, with adapters when asked for, put back to where a checkpoint
    was; and what is saved beside its weights. ``total_steps``: optimizer steps of the whole run,
    which is how long the schedule is."""
    if args.offload_inference_models:
        _check_offload(options)
    load = _keeping_base(args) if args.shared_base else load_causal_lm
    model = build.policy(args, options, tokenizer, resume, load)
    args._vocabulary = model.config.vocab_size
    if args.ptx_coef:  # SFT is a second backward pass of the same step, which Gemini has to be told
        options = replace(options, accumulation_steps=max(options.accumulation_steps, 2))
    assets = build.assets(model, tokenizer, template)
    return _trained(args, options, model, args.lr, total_steps, resume, "actor"), assets


def critic_engine(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    resume: Resume,
    total_steps: int,
    template: Conversation | None = None,
) -> tuple[Engine, ModelAssets]:
    """The critic, likewise. It starts from a checkpoint's or ``--critic_checkpoint_path``,
    ``--critic_pretrain``, the reward model, or ``--pretrain``: the first of these that is there.
    Its head is 0 where that has none.

    Raises ValueError, naming the flag, for a model that cannot be a critic or has another
    vocabulary.
    """
    start = critic_start(args, resume)
    set_seed(args.seed)
    if args.shared_base:
        model = _adapter_on_base(args, Critic, start)
    elif options.lora:
        # This run's own critic is an adapter, on what the run started from.
        base = critic_start(args, Resume()) if start.trained and adapter_base(start.path) else start
        model = apply_lora(
            _scalar(args, options, tokenizer, Critic, base), build.lora_config(args), seed=args.seed
        )
        if base is not start:
            load_lora(model, start.path)
    else:
        model = _scalar(args, options, tokenizer, Critic, start)
    disable_dropout(model)
    assets = build.assets(model, tokenizer, template)
    return _trained(args, options, model, args.critic_lr, total_steps, resume, "critic"), assets


def reward_engine(args: Namespace, options: ParallelOptions, tokenizer: Any) -> Engine | None:
    """The frozen reward model, or None without one. Raises ValueError as :func:`critic_engine`, and
    without a head."""
    start = reward_start(args)
    if start is None or start.new_head:
        return None
    state = random_state()  # a resumed run goes on with the numbers it had, whatever loading draws
    model = (
        _adapter_on_base(args, RewardModel, start)
        if args.shared_base
        else _scalar(args, options, tokenizer, RewardModel, start, dtype="auto")
    )
    disable_dropout(model)
    engine = boost_for_inference(model, options)
    set_random_state(state)
    return engine


def reference(args: Namespace, options: ParallelOptions, actor: Engine) -> InferenceModel | None:
    """The policy as it was before any training: its own base under LoRA, else a frozen copy of
    ``--pretrain``, never of a checkpoint. None where KL counts for nothing."""
    if not args.kl_coef and args.kl_target is None:
        return None
    found = references.reference(args, options, actor)
    return (
        InferenceModel(found.engine, offload=True)
        if args.offload_inference_models and not found.adapters_off
        else found
    )


def _check_offload(options: ParallelOptions) -> None:
    if PLUGINS[options.plugin].places_weights:
        raise ValueError(
            f"--offload_inference_models: --plugin {options.plugin} itself decides where weights "
            "are; leave it out, or "
            "use --plugin gemini_auto, which moves what is idle to host memory"
        )
    if not torch.cuda.is_available():
        logger.warning_once(
            "--offload_inference_models does nothing here: without a GPU all models are in host "
            "memory."
        )


def reward_start(args: Namespace) -> Start | None:
    """Where the reward model is. ``new_head``: there is none, the flag names the critic's start
    alone."""
    if args.rm_checkpoint_path is not None:
        with _naming("rm_checkpoint_path"):
            path = find_model(args.rm_checkpoint_path)
        return Start("rm_checkpoint_path", path, architecture=args.rm_pretrain)
    if args.rm_pretrain is None:
        return None
    return Start(
        "rm_pretrain", _place("rm_pretrain", args.rm_pretrain), new_head=args.no_neural_reward_model
    )


def critic_start(args: Namespace, resume: Resume) -> Start:
    """The first of the critic's possible starts that there is."""
    if (place := _beside(resume.weights)) is not None:
        return Start("checkpoint_path", str(place), trained=True)
    if args.critic_checkpoint_path is not None:
        with _naming("critic_checkpoint_path"):
            path = find_model(args.critic_checkpoint_path, "critic")
        return Start("critic_checkpoint_path", path, architecture=args.rm_pretrain)
    if args.critic_pretrain is not None:
        return Start(
            "critic_pretrain", _place("critic_pretrain", args.critic_pretrain), new_head=True
        )
    return reward_start(args) or Start("pretrain", args.pretrain, new_head=True)


def _place(flag: str, path: str) -> str:
    with _naming(flag):
        return find_model(path)


def _beside(weights: str | None) -> Path | None:
    """The critic that was saved together with the actor of ``weights``."""
    if weights is None or Path(weights).parent.name != "actor":
        return None
    critic = Path(weights).parent.parent / "critic" / "modeling"
    return critic if critic.is_dir() else None


def _trained(
    args: Namespace,
    options: ParallelOptions,
    model: Any,
    lr: float,
    total_steps: int,
    resume: Resume,
    name: str,
) -> Engine:
    engine = boost(
        model,
        options,
        lr=lr,
        weight_decay=args.weight_decay,
        total_steps=max(total_steps, 1),
        warmup_steps=args.warmup_steps,
    )
    # Ranks that see other rows draw other numbers; those that share a copy of the data draw the
    # same.
    set_seed(args.seed + 1 + engine.mesh.dp_rank)
    if resume.folder is not None:
        restore(resume.folder / name, engine, resume.state)
    return engine


def _scalar(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    kind: type[BaseModel],
    start: Start,
    **changes: Any,
):
    """The model of ``start``, all of it checked that can be."""
    loading = build.loading(args, options) | changes
    bare = start.architecture is not None and is_bare(start.path)
    with _naming(start.flag):
        if not adapter_base(start.path):
            source = start.architecture if bare else start.path
            config = (load_configuration if bare else load_config)(
                source, trust_remote_code=args.trust_remote_code
            )
            check_heads(config, options)
            check_family(config, options)
            _check_architecture(args, config, start)
        if bare:
            model = load_scalar_weights(kind, start.architecture, start.path, **loading)
        else:
            model = kind.from_pretrained(start.path, new_head=start.new_head, **loading)
        check_vocabulary(model, tokenizer)
        check_ids(getattr(args, "_vocabulary", 0), model.get_input_embeddings().weight.shape[0])
        _check_same_tokens(args, tokenizer, start.path)
    model.name_or_path = start.path
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Errors of loaders, with the flag that named what they loaded."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def _check_architecture(args: Namespace, config: Any, start: Start) -> None:
    """``--rm_pretrain`` beside ``--rm_checkpoint_path`` names the same architecture."""
    if start.flag != "rm_checkpoint_path" or start.architecture is None:
        return
    named = load_configuration(start.architecture, trust_remote_code=args.trust_remote_code)
    for key in SHAPE:
        found, wanted = getattr(config, key, None), getattr(named, key, None)
        if found != wanted:
            raise ValueError(
                f"{start.path} is of another architecture than --rm_pretrain {start.architecture}: "
                f"{key} is {found} "
                f"there and {wanted} here; name the model that it was trained from, or leave "
                "--rm_pretrain out"
            )


def _check_same_tokens(args: Namespace, tokenizer: Any, path: str) -> None:
    """What the policy writes is read by the other models as ids: they must mean the same to
    them."""
    if not Path(path).is_dir() or not any(Path(path).glob("tokenizer*")):
        return
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(path, args.trust_remote_code).get_vocab()
    # A token that they lack may be the padding that was added for training; ids beyond their table
    # are refused anyway.
    differing = [token for token, number in mine.items() if theirs.get(token, number) != number]
    missing = [token for token in mine if token not in theirs and token != tokenizer.pad_token]
    if differing or missing:
        token = (differing or missing)[0]
        raise ValueError(
            f"{path} was trained with another tokenizer: {len(differing) + len(missing)} of "
            f"{len(mine)} tokens differ "
            f"({token!r} is {mine[token]} for --pretrain and {theirs.get(token, 'missing')} "
            "there). Policy, critic and "
            "reward model read the same ids; train this one from a model of the policy's tokenizer"
        )


def _keeping_base(args: Namespace):
    """A loader of the policy that leaves its backbone, as it is before LoRA, to the other
    models."""

    def load(path: str, **keywords: Any):
        model = load_causal_lm(path, **keywords)
        args._base = _with_same_weights(without_head(model))
        return model

    return load


def _with_same_weights(module: Any):
    """A copy of the modules that holds the very same tensors."""
    return copy.deepcopy(
        module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    )


def _adapter_on_base(args: Namespace, kind: type[BaseModel], start: Start):
    """``kind`` on the backbone that :func:`actor_engine` left; with adapters and head of ``start``,
    where that has any.

    Raises ValueError for a ``start`` that is neither ``--pretrain`` nor an adapter on it.
    """
    model = kind(backbone=_with_same_weights(args._base))
    model.name_or_path = args.pretrain
    if start.path == args.pretrain:
        return apply_lora(model, build.lora_config(args), seed=args.seed)
    base = adapter_base(start.path)
    if base is None or Path(base).resolve() != Path(args.pretrain).resolve():
        raise ValueError(
            f"--shared_base: --{start.flag} {start.path} is no LoRA adapter on --pretrain "
            f"{args.pretrain}; train the "
            "reward model from it with train_rm.py --lora_rank, or leave --shared_base out"
        )
    with _naming(start.flag):
        # With the rank that it has, whatever that of the policy is.
        settings = LoraConfig.from_file(Path(start.path) / SETTINGS)
        model = apply_lora(model, settings, seed=args.seed)  # type: ignore[assignment]
        load_lora(model, start.path)
    return model
