"""The four models of PPO (two of GRPO, or three) as engines: where each starts, and what it has to
share with the others."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from coati.cli.online_settings import (
    OnlineSettings,
    PPOSettings,
    RewardSettings,
)
from coati.cli.rollout_checks import check_ids
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
    trained_from,
)
from coati.models.lora.adapter_files import SETTINGS, load_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from coati.models.scalar_loading import load_scalar_weights
from coati.models.tokenizer import check_vocabulary, load_tokenizer
from coati.parallel.families import check_family
from coati.parallel.inference_model import InferenceModel
from coati.parallel.launch import set_seed
from coati.parallel.plugin_checks import check_heads
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.recipes import build, reference_model
from coati.recipes.build import Trained
from coati.recipes.run import Run
from coati.utils.logging import get_logger
from coati.utils.phases import phase

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


@dataclass(frozen=True)
class Actor(Trained):
    """The policy. ``vocabulary``: ids that it can write. ``base``: its backbone before LoRA, where
    the other models share it."""

    vocabulary: int
    base: Any = None


def load_actor(run: Run[OnlineSettings], total_steps: int) -> Actor:
    """The policy, without dropout, with adapters when asked for, restored from the checkpoint.
    ``total_steps``: optimizer steps of the whole run, the length of the schedule."""
    settings = run.settings
    if settings.rollout.offload_inference_models:
        _check_offload(run.options)
    base = _Base()
    load = base.load if settings.lora.shared_base else load_causal_lm
    model = build.policy(run, load)
    vocabulary = model.config.vocab_size
    if settings.ptx.ptx_coef:
        # SFT is a second backward pass of the same step, which Gemini has to be told.
        steps = max(run.options.accumulation_steps, 2)
        run = replace(run, options=replace(run.options, accumulation_steps=steps))
    assets = build.assets(run, model)
    engine = build.boosted(run, model, settings.optimizer, total_steps, "actor")
    return Actor(engine, assets, vocabulary, base.module)


def load_critic(run: Run[PPOSettings], actor: Actor, total_steps: int) -> Trained:
    """The critic, likewise. It starts from a checkpoint's or ``--critic_checkpoint_path``,
    ``--critic_pretrain``, the reward model, or ``--pretrain``: the first of these that is there.
    Its head is 0 where that has none.

    Raises ValueError, naming the flag, for a model that cannot be a critic or has another
    vocabulary.
    """
    settings = run.settings
    start = critic_start(settings, run.resume.weights)
    set_seed(settings.seed)
    if settings.lora.shared_base:
        model = adapter_on_base(run, actor.base, Critic, start)
    elif run.options.lora:
        # This run's own critic is an adapter, on what the run started from.
        base = critic_start(settings) if start.trained and adapter_base(start.path) else start
        model = load_scalar(run, Critic, base, actor.vocabulary)
        model = apply_lora(model, build.lora_config(settings.lora), seed=settings.seed)
        if base is not start:
            load_lora(model, start.path)
    else:
        model = load_scalar(run, Critic, start, actor.vocabulary)
    disable_dropout(model)
    assets = build.assets(run, model)
    optimizer = replace(settings.optimizer, lr=settings.critic.critic_lr)
    return Trained(build.boosted(run, model, optimizer, total_steps, "critic"), assets)


def load_reward_model(run: Run[OnlineSettings], actor: Actor) -> InferenceModel | None:
    """The frozen reward model, or None without one. Raises ValueError as :func:`load_critic`, and
    without a head."""
    settings = run.settings
    start = reward_start(settings.reward)
    if start is None or start.new_head:
        return None
    if settings.lora.shared_base:
        load = partial(adapter_on_base, run, actor.base, RewardModel, start)
    else:
        # As it was saved: its scores are not to change with how the policy's base is stored.
        whole = {"dtype": "auto", "quantize_base": None}
        load = partial(load_scalar, run, RewardModel, start, actor.vocabulary, **whole)
    return build.frozen(run.options, load, settings.rollout.offload_inference_models)


def load_reference(run: Run[OnlineSettings], actor: Actor) -> InferenceModel | None:
    """The policy as it was before any training: its own base under LoRA, else a frozen copy of
    ``--pretrain``, never of a checkpoint. None where KL counts for nothing."""
    kl = run.settings.kl
    if not kl.kl_coef and kl.kl_target is None:
        return None
    offload = run.settings.rollout.offload_inference_models
    return reference_model.reference(run, actor.engine, offload=offload)


def _check_offload(options: ParallelOptions) -> None:
    if PLUGINS[options.plugin].places_weights:
        raise ValueError(
            f"--offload_inference_models: --plugin {options.plugin} itself decides where weights "
            "are; leave it out, or use --plugin gemini_auto, which moves what is idle to host "
            "memory"
        )
    if not torch.cuda.is_available():
        logger.warning_once(
            "--offload_inference_models does nothing here: without a GPU all models are in host "
            "memory."
        )


def reward_start(reward: RewardSettings) -> Start | None:
    """Where the reward model is. ``new_head``: there is none, the flag names the critic's start
    alone."""
    if reward.rm_checkpoint_path is not None:
        path = _place("rm_checkpoint_path", reward.rm_checkpoint_path)
        return Start("rm_checkpoint_path", path, architecture=reward.rm_pretrain)
    if reward.rm_pretrain is None:
        return None
    place = _place("rm_pretrain", reward.rm_pretrain)
    return Start("rm_pretrain", place, new_head=reward.no_neural_reward_model)


def critic_start(settings: PPOSettings, weights: str | None = None) -> Start:
    """The first of the critic's possible starts that there is. ``weights``: the actor's, of the
    checkpoint that the run resumes from."""
    critic = settings.critic
    if (beside := _beside(weights)) is not None:
        return Start("checkpoint_path", str(beside), trained=True)
    if critic.critic_checkpoint_path is not None:
        path = _place("critic_checkpoint_path", critic.critic_checkpoint_path, "critic")
        architecture = settings.reward.rm_pretrain
        return Start("critic_checkpoint_path", path, architecture=architecture)
    if critic.critic_pretrain is not None:
        path = _place("critic_pretrain", critic.critic_pretrain)
        return Start("critic_pretrain", path, new_head=True)
    new = Start("pretrain", settings.model.pretrain, new_head=True)
    return reward_start(settings.reward) or new


def readers(run: Run[OnlineSettings]) -> list[Start]:
    """Where the models are that read what the policy writes: critic and reward model."""
    settings = run.settings
    starts = []
    if isinstance(settings, PPOSettings):
        starts.append(critic_start(settings, run.resume.weights))
    reward = reward_start(settings.reward)
    return starts if reward is None or reward.new_head else [*starts, reward]


def _place(flag: str, path: str, *parts: str) -> str:
    with _naming(flag):
        return find_model(path, *parts)


def _beside(weights: str | None) -> Path | None:
    """The critic that was saved together with the actor of ``weights``."""
    if weights is None or Path(weights).parent.name != "actor":
        return None
    critic = Path(weights).parent.parent / "critic" / "modeling"
    return critic if critic.is_dir() else None


@phase("loading the critic or reward model")
def load_scalar(
    run: Run[OnlineSettings], kind: type[BaseModel], start: Start, vocabulary: int, **changes: Any
) -> Any:
    """The model of ``start``, all of it checked that can be. ``vocabulary``: ids that it may have
    to read."""
    loading = build.loading(run) | changes
    trust = run.settings.model.trust_remote_code
    bare = start.architecture is not None and is_bare(start.path)
    with _naming(start.flag):
        if not adapter_base(start.path):
            source = start.architecture if bare else start.path
            read = load_configuration if bare else load_config
            config = read(source, trust_remote_code=trust)
            check_heads(config, run.options)
            check_family(config, run.options)
            _check_architecture(config, start, trust)
        if bare:
            model = load_scalar_weights(kind, start.architecture, start.path, **loading)
        else:
            model = kind.from_pretrained(start.path, new_head=start.new_head, **loading)
        check_vocabulary(model, run.tokenizer)
        check_ids(vocabulary, model.get_input_embeddings().weight.shape[0])
        _check_same_tokens(run.tokenizer, start.path, trust)
    model.name_or_path = start.path
    model.config.pad_token_id = run.tokenizer.pad_token_id
    return model


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Errors of loaders, with the flag that named what they loaded."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def _check_architecture(config: Any, start: Start, trust_remote_code: bool) -> None:
    """``--rm_pretrain`` beside ``--rm_checkpoint_path`` names the same architecture."""
    if start.flag != "rm_checkpoint_path" or start.architecture is None:
        return
    named = load_configuration(start.architecture, trust_remote_code=trust_remote_code)
    for key in SHAPE:
        found = getattr(config, key, None)
        wanted = getattr(named, key, None)
        if found != wanted:
            raise ValueError(
                f"{start.path} is of another architecture than --rm_pretrain {start.architecture}: "
                f"{key} is {found} there and {wanted} here; name the model that it was trained "
                "from, or leave --rm_pretrain out"
            )


def _check_same_tokens(tokenizer: Any, path: str, trust_remote_code: bool) -> None:
    """What the policy writes is read by the other models as ids: they must mean the same to
    them."""
    if not Path(path).is_dir() or not any(Path(path).glob("tokenizer*")):
        return
    mine = tokenizer.get_vocab()
    theirs = load_tokenizer(path, trust_remote_code).get_vocab()
    # A token that they lack may be the padding that was added for training; ids beyond their table
    # are refused anyway.
    differing = [token for token, number in mine.items() if theirs.get(token, number) != number]
    missing = [token for token in mine if token not in theirs and token != tokenizer.pad_token]
    if differing or missing:
        token = (differing or missing)[0]
        raise ValueError(
            f"{path} was trained with another tokenizer: {len(differing) + len(missing)} of "
            f"{len(mine)} tokens differ ({token!r} is {mine[token]} for --pretrain and "
            f"{theirs.get(token, 'missing')} there). Policy, critic and reward model read the same "
            "ids; train this one from a model of the policy's tokenizer"
        )


class _Base:
    """A loader of the policy that keeps its backbone, as it is before LoRA, for the others."""

    module: Any = None

    def load(self, path: str, **keywords: Any) -> Any:
        model = load_causal_lm(path, **keywords)
        self.module = _with_same_weights(without_head(model))
        return model


def _with_same_weights(module: Any):
    """A copy of the modules that holds the very same tensors."""
    return copy.deepcopy(
        module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    )


def adapter_on_base(
    run: Run[OnlineSettings], base: Any, kind: type[BaseModel], start: Start
) -> Any:
    """``kind`` on the actor's ``base``; with adapters and head of ``start``, where that has any.

    Raises ValueError for a ``start`` that is neither ``--pretrain`` nor an adapter on it.
    """
    settings = run.settings
    pretrain = run.settings.model.pretrain
    model: Any = kind(backbone=_with_same_weights(base))
    model.name_or_path = pretrain
    if start.path == pretrain:
        return apply_lora(model, build.lora_config(settings.lora), seed=settings.seed)
    found = trained_from(start.path)
    if found is None or Path(found).resolve() != Path(pretrain).resolve():
        raise ValueError(
            f"--shared_base: --{start.flag} {start.path} is no LoRA adapter on --pretrain "
            f"{pretrain}; train the reward model from it with coati rm --lora_rank, or leave "
            "--shared_base out"
        )
    with _naming(start.flag):
        # With the rank that it has, whatever that of the policy is.
        config = replace(LoraConfig.from_file(Path(start.path) / SETTINGS), quantize_base=None)
        model = apply_lora(model, config, seed=settings.seed)  # type: ignore[assignment]
        load_lora(model, start.path)
    return model
