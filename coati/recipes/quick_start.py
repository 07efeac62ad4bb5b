"""The Python front door: ``coati.sft(model, conversations, lr=2e-5)`` does in this process what the
command ``coati sft`` does, with the same flags as keywords, and returns the trained model.

Importing this module loads nothing heavy.
"""

import atexit
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coati.cli.arguments import sft_parser
from coati.cli.distilling import gkd_parser
from coati.cli.offline_rl import ilql_parser
from coati.cli.preferences import dpo_parser, kto_parser, orpo_parser, rm_parser
from coati.cli.pretraining import pretrain_parser
from coati.cli.rollout_pairs import online_dpo_parser
from coati.cli.rollouts import grpo_parser, ppo_parser
from coati.recipes.command import load
from coati.recipes.extras import Extras
from coati.recipes.keyword_flags import canonical_names, parsed, takes_flags_of, words_of
from coati.recipes.row_files import json_file, paths_of
from coati.recipes.trained_model import TrainedModel, TrainedRewardModel, collect_garbage
from coati.rewards.registry import GIVEN
from coati.trainer.callbacks import Callback, CallbackList
from coati.utils.errors import no_early_exit
from coati.utils.output_paths import check_outputs

if TYPE_CHECKING:
    from torch import Tensor

    from coati.models.pairwise_loss import Pair
    from coati.models.policy_loss import PolicyTokens

# A directory, a hub name, the result of another stage, or a transformers model in memory.
Model = str | os.PathLike | TrainedModel | Any
Reward = str | Callable[..., Any] | TrainedRewardModel
Callbacks = Iterable[Callback]

DATA_FLAGS = ("dataset", "eval_dataset", "prompt_dataset", "eval_prompt_dataset", "ptx_dataset")
JSON_FLAGS = ("conversation_template_config", "lora_config", "plugin_args")
IN_MEMORY = "(a model in memory)"
RUNS = Path("output")
# What a caller's own loss is in place of.
PAIR_LOSS = ("loss_type", "loss_weights", "gamma", "label_smoothing")
SURROGATE = ("policy_loss", "dual_clip", "cispo_cap", "sapo_tau")
BEFORE_A_RUN = {"arguments.json", "environment.json", "run.json", "start"}


@takes_flags_of(sft_parser)
def sft(
    pretrain: Model,
    dataset: Any,
    *,
    loss: "Callable[[Tensor, dict[str, Tensor]], Tensor] | None" = None,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Supervised fine-tuning on the assistant's turns of conversations.

    Args:
        pretrain: the model to start from: a directory or hub name, the result of another stage, or
            a transformers model in memory together with its ``tokenizer``.
        dataset: conversations: a list of ``{"messages": [...]}`` or of lists of messages, a
            ``datasets.Dataset``, or paths of files.
        loss: another loss: ``loss(logps, batch)`` gets the log-probs (n,) of the supervised tokens
            and returns a loss (n,) for each.
        callbacks: of :class:`coati.Callback`.
        flags: those of the command ``coati sft``, below. Without ``save_dir`` the run is written to
            the first free ``output/sft/001``, ``002``, ...

    Raises:
        TypeError: for a keyword that is no flag.
        ValueError: for what the command would refuse.
    """
    return _train("sft", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks, loss)


@takes_flags_of(pretrain_parser)
def pretrain(
    pretrain: Model,
    dataset: Any,
    *,
    loss: "Callable[[Tensor, dict[str, Tensor]], Tensor] | None" = None,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Continued pre-training on every token of plain texts: rows of ``text``, or paths of .txt and
    other files; conversations may be mixed in (``dataset_weights``). Arguments and errors as of
    :func:`coati.sft`."""
    return _train("pretrain", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks, loss)


@takes_flags_of(rm_parser)
def rm(
    pretrain: Model,
    dataset: Any,
    *,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedRewardModel:
    """A reward model, from pairs: rows of ``prompt``, ``chosen`` and ``rejected``. Its result
    scores responses, and can be the ``reward`` of :func:`coati.ppo` and :func:`coati.grpo`.
    Arguments and errors as of :func:`coati.sft`."""
    result = _train("rm", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks)
    assert isinstance(result, TrainedRewardModel)
    return result


@takes_flags_of(dpo_parser)
def dpo(
    pretrain: Model,
    dataset: Any,
    *,
    loss: "Callable[[Pair], Tensor] | None" = None,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Direct preference optimization and its family, on pairs: rows of ``prompt``, ``chosen`` and
    ``rejected``. Arguments and errors as of :func:`coati.sft`, but for

    Args:
        loss: another loss: a function of a :class:`~coati.models.pairwise_loss.Pair` of B pairs
            that returns losses (B,); ``beta`` is then that of the logged rewards alone.
    """
    if loss is not None:
        _refuse_beside("loss", PAIR_LOSS, flags, "dpo")
    return _train("dpo", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks, loss)


@takes_flags_of(orpo_parser)
def orpo(
    pretrain: Model,
    dataset: Any,
    *,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Odds-ratio preference optimization, on pairs: rows of ``prompt``, ``chosen`` and
    ``rejected``. Arguments and errors as of :func:`coati.sft`."""
    return _train("orpo", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks)


@takes_flags_of(kto_parser)
def kto(
    pretrain: Model,
    dataset: Any,
    *,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Kahneman-Tversky optimization, on single responses: rows of ``prompt``, ``completion`` and
    ``label`` (True for a good one). Arguments and errors as of :func:`coati.sft`."""
    return _train("kto", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks)


@takes_flags_of(gkd_parser)
def gkd(
    pretrain: Model,
    dataset: Any,
    *,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Distillation: the model learns the distribution of a ``teacher`` (a directory, a hub name, or
    the result of another stage) at each token of the assistant's turns, of the rows' responses and
    of its own. Arguments and errors as of :func:`coati.sft`."""
    return _train("gkd", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks)


@takes_flags_of(ilql_parser)
def ilql(
    pretrain: Model,
    dataset: Any,
    *,
    callbacks: Sequence[Callback] = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Implicit language Q-learning, on conversations with a ``score`` each, labeled responses or
    pairs. Its result decodes by the heads that were learned. Arguments and errors as of
    :func:`coati.sft`."""
    return _train("ilql", pretrain, {"dataset": dataset, **flags}, tokenizer, callbacks)


@takes_flags_of(ppo_parser)
def ppo(
    pretrain: Model,
    prompt_dataset: Any,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    loss: "Callable[[PolicyTokens], Tensor] | None" = None,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """PPO with a critic: the model is trained on its own responses to prompts. Arguments and errors
    as of :func:`coati.grpo`; the critic starts from the reward model where there is one."""
    return _train_rl("ppo", pretrain, prompt_dataset, reward, flags, tokenizer, callbacks, loss)


@takes_flags_of(grpo_parser)
def grpo(
    pretrain: Model,
    prompt_dataset: Any,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    loss: "Callable[[PolicyTokens], Tensor] | None" = None,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """GRPO and its variants: the model is trained on its own responses to prompts, compared in
    groups. Arguments and errors as of :func:`coati.sft`, but for

    Args:
        prompt_dataset: prompts: rows of ``prompt`` (a text, or messages that end with the user),
            with ``gt_answer`` where a reward compares with the right answer.
        reward: what scores responses, one or several that are added up (``reward_weights``): a
            Python function, the name of a built-in one, ``path.py:function``, or the result of
            :func:`coati.rm`. A function is called with those of the keywords prompts, responses,
            gt_answers, lengths, stopped, max_new_tokens and tags that it names, and returns one
            number per response.
        loss: another policy loss: a function of a :class:`~coati.models.policy_loss.PolicyTokens`
            that returns losses (B, A); a KL term is added to it.
    """
    return _train_rl("grpo", pretrain, prompt_dataset, reward, flags, tokenizer, callbacks, loss)


@takes_flags_of(online_dpo_parser)
def online_dpo(
    pretrain: Model,
    prompt_dataset: Any,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    loss: "Callable[[Pair], Tensor] | None" = None,
    callbacks: Callbacks = (),
    tokenizer: Any = None,
    **flags: Any,
) -> TrainedModel:
    """Online DPO: of the model's own responses to each prompt the best and the worst by ``reward``
    make a pair. Arguments and errors as of :func:`coati.grpo`; ``loss`` as of :func:`coati.dpo`."""
    verb = "online_dpo"
    return _train_rl(verb, pretrain, prompt_dataset, reward, flags, tokenizer, callbacks, loss)


def _train_rl(
    verb: str,
    pretrain: Model,
    prompts: Any,
    reward: Reward | Sequence[Reward] | None,
    flags: Mapping[str, Any],
    tokenizer: Any,
    callbacks: Callbacks,
    loss: Callable[..., Any] | None,
) -> TrainedModel:
    given = {"prompt_dataset": prompts, **flags}
    if loss is not None:
        replaced = PAIR_LOSS if verb == "online_dpo" else SURROGATE
        _refuse_beside("loss", replaced, flags, verb)
    functions: dict[str, Callable[..., Any]] = {}
    if reward is not None:
        several: list[Any] = list(reward) if isinstance(reward, list | tuple) else [reward]
        found, functions = _rewards(several, verb)
        _refuse_beside("reward", found, flags, verb)
        given |= found
    return _train(verb, pretrain, given, tokenizer, callbacks, loss, functions)


def _rewards(
    rewards: Sequence[Reward], verb: str
) -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
    """The flags that ``rewards`` stand for, and the functions among them by their names there."""
    names: list[str] = []
    functions: dict[str, Callable[..., Any]] = {}
    models = []
    for each in rewards:
        if isinstance(each, TrainedRewardModel):
            models.append(_place_of(each))
        elif isinstance(each, str):
            names.append(each)
        elif callable(each):
            names.append(_free_name(each, functions))
            functions[names[-1]] = each
        else:
            raise TypeError(
                f"coati.{verb}: reward is {type(each).__name__}; expected a function, the name of "
                "one, the result of coati.rm, or a list of them"
            )
    if len(models) > 1:
        raise ValueError(f"coati.{verb}: reward has {len(models)} reward models; one can be used")
    found: dict[str, Any] = {"reward_functions": names} if names else {}
    return found | ({"rm_pretrain": models[0]} if models else {}), functions


def _free_name(function: Callable[..., Any], taken: Iterable[str]) -> str:
    name = GIVEN + getattr(function, "__name__", type(function).__name__).strip("<>")
    numbered = (name if number == 1 else f"{name}_{number}" for number in range(1, 1000))
    return next(each for each in numbered if each not in taken)


def _refuse_beside(keyword: str, names: Iterable[str], flags: Mapping[str, Any], verb: str) -> None:
    """Raise ValueError for ``flags`` of ``names``, in whose place ``keyword`` is."""
    others = [name for name in names if flags.get(name) is not None]
    if others:
        raise ValueError(
            f"coati.{verb}: {others[0]} does nothing beside {keyword}; leave one of the two out"
        )


def _train(
    verb: str,
    pretrain: Model,
    flags: Mapping[str, Any],
    tokenizer: Any,
    callbacks: Callbacks,
    loss: Callable[..., Any] | None = None,
    rewards: Mapping[str, Callable[..., Any]] | None = None,
) -> TrainedModel:
    """The command ``verb`` in this process, whose group is joined first where a launcher started
    it; every rank must call it."""
    command = load(verb.replace("_", "-"))
    function = f"coati.{verb}"
    extras = Extras(tuple(CallbackList(callbacks).callbacks), loss, rewards or {})
    if "RANK" in os.environ:
        from coati.parallel.launch import launch

        launch()
    start = None if isinstance(pretrain, str | os.PathLike | TrainedModel) else pretrain
    if start is not None:
        _check_in_memory(start, tokenizer, function)
    flags = canonical_names(command.parser(), flags, function)
    given = _as_flags({"pretrain": IN_MEMORY if start is not None else pretrain, **flags})
    words = words_of(given, function)
    settings = parsed(command.parse, words, function)  # all of it is checked before a run is begun
    if settings.launch.wanted:
        raise ValueError(
            f"{function}: nproc and hostfile start the command's processes, and this is one of "
            "Python's; start the script with torchrun --nproc_per_node N"
        )
    check_outputs(settings.flags)
    save_dir = settings.output.save_dir
    chosen = flags.get("save_dir") is not None or "save_dir" in settings.flags_given
    fresh = not chosen and not settings.output.dry_run
    if fresh:
        if settings.output.checkpoint_path == "auto":
            raise ValueError(f"{function}: checkpoint_path 'auto' looks in save_dir; name it")
        save_dir = given["save_dir"] = _new_run(verb)
    if start is not None:
        given["pretrain"] = _written(start, tokenizer, Path(save_dir) / "start")
    settings = parsed(command.parse, words_of(given, function), function)
    _leave_group_at_exit()
    from coati.parallel.launch import explained
    from coati.recipes.run_dir import locks_released
    from coati.trainer.progress import bars_in_terminals_alone

    again = f'the same call of {function} with save_dir="{save_dir}", checkpoint_path="auto"'
    try:
        with no_early_exit(function), locks_released(), bars_in_terminals_alone():
            command.function()(settings, replace(extras, again=again))
    except Exception as error:
        if fresh:
            _remove_unused(Path(save_dir))
        reason = explained(error)
        if reason is error:
            raise
        raise reason from None
    finally:
        collect_garbage()
    return (TrainedRewardModel if verb == "rm" else TrainedModel)(save_dir)


def _as_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with a path for each object: rows, results of other stages, dicts that a flag reads
    from a JSON file."""
    flags = dict(given)
    for name, value in given.items():
        if name in DATA_FLAGS and value is not None:
            flags[name] = paths_of(value, name)
        elif name in JSON_FLAGS and isinstance(value, Mapping):
            flags[name] = json_file(dict(value))
        elif name == "template_args" and isinstance(value, Mapping):
            flags[name] = json.dumps(dict(value))
        elif name == "columns" and isinstance(value, Mapping):
            flags[name] = [f"{target}={column or ''}" for target, column in value.items()]
        elif isinstance(value, TrainedModel):
            flags[name] = _place_of(value)
    template = _template_of(given["pretrain"])
    prepared = any(
        (Path(path) / "preparation.json").exists()
        for name in DATA_FLAGS
        for path in flags.get(name) or ()
    )
    if template is not None and flags.get("conversation_template_config") is None and not prepared:
        flags["conversation_template_config"] = template
    return flags


def _place_of(trained: TrainedModel) -> str:
    """Its directory, in full, since an adapter that is trained on it names it as its base; what
    was loaded of it makes room."""
    trained.release()
    return str(Path(trained.path).resolve())


def _template_of(pretrain: Any) -> str | None:
    """The conversation template that an earlier stage was trained with."""
    if not isinstance(pretrain, TrainedModel):
        return None
    file = Path(pretrain.path) / "conversation_template.json"
    return str(file) if file.exists() else None


def _new_run(verb: str) -> str:
    """A new directory below ``output``, the same on every rank."""
    from coati.utils.distributed import broadcast_object, is_rank_0

    folder = None
    if is_rank_0():
        number = 1
        while folder is None:
            place = RUNS / verb / f"{number:03d}"
            try:
                place.mkdir(parents=True)
                folder = str(place)
            except FileExistsError:
                number += 1
    return broadcast_object(folder)


def _leave_group_at_exit() -> None:
    """The process group stays for the next stage; once is enough to leave it."""
    from coati.parallel.launch import shut_down

    atexit.unregister(shut_down)
    atexit.register(shut_down)


def _remove_unused(save_dir: Path) -> None:
    """Of a run that failed before its first step only what was told is there: that is no run."""
    from coati.utils.distributed import is_rank_0

    if is_rank_0() and BEFORE_A_RUN.issuperset(os.listdir(save_dir)):
        shutil.rmtree(save_dir)


def _check_in_memory(model: Any, tokenizer: Any, function: str) -> None:
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"{function}: pretrain is {type(model).__name__}; expected a directory or hub name, "
            "the result of another stage, or a transformers model"
        )
    if tokenizer is None:
        raise TypeError(f"{function}: a model in memory needs its tokenizer: tokenizer=...")


def _written(model: Any, tokenizer: Any, folder: Path) -> str:
    """A transformers model in memory, written to ``folder``: the reference model, resumed runs and
    the run's files start from it."""
    from coati.parallel.shared_folder import check_shared
    from coati.trainer.progress import bars_in_terminals_alone
    from coati.utils.distributed import is_rank_0, raise_together

    why = "the model in memory is written there for all processes"
    check_shared("save_dir", folder.parent, why)

    def write() -> None:
        if is_rank_0():
            with bars_in_terminals_alone():
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    raise_together(write)
    return str(folder.resolve())
