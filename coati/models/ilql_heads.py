"""The heads of implicit language Q-learning (ILQL, arXiv 2206.11871) on the last hidden state: two
action values Q1 and Q2 of every token of the vocabulary, one value V of the state, and the targets
Q1' and Q2', slow copies of the first two.

Notation: h (n, d) the hidden states before the actions a (n,), V vocabulary entries.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.logprobs import CHUNK_BYTES, linear_logprobs
from coati.utils.logging import get_logger

logger = get_logger(__name__)

NAME = "ilql_heads"  # of the module in the model, and of the field of its configuration
# In the format of safetensors; not of that name, because vLLM and others read every *.safetensors
# of a directory as weights of the model.
FILE = "ilql_heads.st"
TARGET = "target."  # what the names of the targets' tensors begin with
Q_HEADS = ("q1", "q2")
WIDER = 2  # hidden width of a head, times d


@dataclass(frozen=True)
class ActionValues:
    """What the heads say of n actions, each (n,) fp32: Q1(s, a), Q2(s, a), the log-softmax of
    either over the vocabulary at a, V(s), and ``target``, min_i Qi'(s, a) without gradient."""

    q1: Tensor
    q2: Tensor
    q1_logps: Tensor
    q2_logps: Tensor
    v: Tensor
    target: Tensor


def _head(width: int, outputs: int) -> nn.Sequential:
    inner = WIDER * width
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, outputs))


class ILQLHeads(nn.Module):
    """Two-layer heads of hidden width 2d. The targets are no parameters: plain fp32 tensors, which
    no plugin casts, so that steps of a thousandth are not rounded away in 16 bits.

    Args:
        width: d. vocabulary: V, the rows of the output embedding.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.q1 = _head(width, vocabulary)
        self.q2 = _head(width, vocabulary)
        self.v = _head(width, 1)
        self.targets: dict[str, Tensor] = {}
        self.sync(1.0)

    def _online(self) -> Iterator[tuple[str, Tensor]]:
        for head in Q_HEADS:
            for name, parameter in getattr(self, head).named_parameters():
                yield f"{head}.{name}", parameter

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """targets <- alpha x Q heads + (1 - alpha) x targets."""
        for name, parameter in self._online():
            now = parameter.detach().to(torch.float32, copy=True)
            before = self.targets.get(name)
            if before is None or alpha == 1:
                self.targets[name] = now
            else:
                self.targets[name] = before.to(now.device).lerp_(now, alpha)

    def target_parts(self, head: str, device: torch.device) -> tuple[Tensor, ...]:
        """Weight and bias of both layers of the target of ``head``, on ``device``."""
        names = [f"{head}.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
        for name in names:
            self.targets[name] = self.targets[name].to(device)
        return tuple(self.targets[name] for name in names)

    def values(self, states: Tensor) -> Tensor:
        """V of states (..., d), (...) fp32; its second layer is computed in fp32 whatever the model
        computes in, as a scalar head's."""
        inner = self.v[1](self.v[0](states))
        last = self.v[2]
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(inner.float(), last.weight.float(), last.bias.float())[..., 0]

    def forward(self, states: Tensor, actions: Tensor) -> ActionValues:
        """h (n, d) and a (n,) -> their values. One chunk of (rows, V) exists at a time, and of the
        targets none: only the columns of ``actions`` are multiplied."""
        q1, q1_logps = self._q(self.q1, states, actions)
        q2, q2_logps = self._q(self.q2, states, actions)
        target = self.target_values(states, actions)
        return ActionValues(q1, q2, q1_logps, q2_logps, self.values(states), target)

    @staticmethod
    def _q(head: Any, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Q at the actions, and its log-softmax there, (n,) fp32 each."""
        inner = head[1](head[0](states))
        last = head[2]
        logps = linear_logprobs(inner, last.weight, last.bias, actions)
        chosen = F.embedding(actions, last.weight).float()
        with torch.autocast(states.device.type, enabled=False):
            values = (inner.float() * chosen).sum(-1) + last.bias.float()[actions]
        return values, logps

    @torch.no_grad()
    def target_values(self, states: Tensor, actions: Tensor) -> Tensor:
        """min_i Qi'(s, a), (n,) fp32."""
        step = max(1, CHUNK_BYTES // (4 * WIDER * states.shape[-1]))
        with torch.autocast(states.device.type, enabled=False):
            parts = [
                torch.minimum(*(self._target_at(head, rows, chosen) for head in Q_HEADS))
                for rows, chosen in zip(states.split(step), actions.split(step), strict=True)
            ]
        return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)

    def _target_at(self, head: str, states: Tensor, actions: Tensor) -> Tensor:
        first, first_bias, last, last_bias = self.target_parts(head, states.device)
        inner = F.linear(states.detach().float(), first, first_bias).relu_()
        return (inner * F.embedding(actions, last)).sum(-1) + last_bias[actions]

    @torch.no_grad()
    def advantages(self, states: Tensor) -> Tensor:
        """min_i Qi'(s, .) - V(s) of states (..., d): (..., V) fp32, for decoding."""
        q: Tensor | None = None
        with torch.autocast(states.device.type, enabled=False):
            for head in Q_HEADS:
                first, first_bias, last, last_bias = self.target_parts(head, states.device)
                inner = F.linear(states.float(), first, first_bias).relu_()
                found = F.linear(inner, last, last_bias)
                q = found if q is None else torch.minimum(q, found, out=q)
            assert q is not None
        kept = states.to(self.v[0].weight.dtype)
        return q.sub_(self.values(kept)[..., None])


def heads_of(model: Any) -> ILQLHeads | None:
    """The heads that were attached to ``model``, which may be wrapped by adapters."""
    return getattr(model, NAME, None)


def attach(model: Any, source: str | os.PathLike | None = None, seed: int = 0) -> ILQLHeads:
    """Give the language model ``model``, perhaps with adapters, its heads: those saved in
    ``source``, else new ones drawn with ``seed``. They are trained whole, under LoRA too.

    Raises ValueError where the saved ones are of another width or vocabulary.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = base.get_output_embeddings()
    vocabulary, width = embedding.weight.shape
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        heads = ILQLHeads(width, vocabulary)
    heads.to(embedding.weight.device, embedding.weight.dtype)
    file = None if source is None else saved_file(source, base.config)
    if file is not None:
        load(heads, file)
        logger.info(f"{source} has ILQL's heads: it goes on from them.")
    setattr(base, NAME, heads)
    return heads


def saved_file(path: str | os.PathLike, config: Any = None) -> Path | None:
    """The file of the heads of the model of ``path``, a directory or (where ``config`` names it) a
    hub name; None where it has none.

    Raises ValueError where the configuration names a file that is not there.
    """
    if Path(path).is_dir():
        if (Path(path) / FILE).is_file():
            return Path(path) / FILE
        named = getattr(config, NAME, None) and (Path(path) / "config.json").is_file()
        if named:
            raise ValueError(
                f"{path}: its config.json names {FILE}, ILQL's heads, which is not there; copy it "
                f"from where the model was trained, or remove {NAME} from config.json"
            )
        return None
    if not getattr(config, NAME, None):
        return None
    from transformers.utils import cached_file

    found = cached_file(path, FILE)
    return None if found is None else Path(found)


def name_in(config: Any, there: bool) -> None:
    """Name the file of the heads in the configuration of a model; or not, where there are none,
    as in what other methods make of such a model."""
    if there:
        setattr(config, NAME, FILE)
    elif hasattr(config, NAME):
        delattr(config, NAME)


def tensors_of(heads: ILQLHeads, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is in a file: the heads' ``weights`` and the targets."""
    targets = {f"{TARGET}{name}": tensor.cpu() for name, tensor in heads.targets.items()}
    return {name: tensor.contiguous() for name, tensor in (weights | targets).items()}


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``tensors`` of a model by name, without and with those of the heads alone, under their names
    there."""
    mark = f"{NAME}."
    own = {name.partition(mark)[2]: t for name, t in tensors.items() if mark in name}
    return {name: t for name, t in tensors.items() if mark not in name}, own


def load(heads: ILQLHeads, file: Path) -> None:
    """Put the tensors of ``file`` into ``heads``. Raises ValueError for what is not theirs."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable ({error}); expected ILQL's heads") from error
    wanted = {name: parameter.shape for name, parameter in heads.named_parameters()}
    wanted |= {f"{TARGET}{name}": tensor.shape for name, tensor in heads.targets.items()}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{file}: no {missing[0]}; expected ILQL's heads and their targets")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{file}: {name} is {tuple(found[name].shape)}, of this model it would be "
                f"{tuple(shape)}: another model's heads, or tokens were added to its vocabulary"
            )
    heads.load_state_dict({name: found[name] for name, _ in heads.named_parameters()})
    heads.targets = {
        name: found[f"{TARGET}{name}"].float().to(tensor.device)
        for name, tensor in heads.targets.items()
    }


def heads_from(file: Path, device: torch.device, dtype: torch.dtype) -> ILQLHeads:
    """The heads of ``file`` for inference. Raises ValueError for what is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            vocabulary = tensors.get_slice("q1.2.weight").get_shape()[0]
            width = tensors.get_slice("q1.0.weight").get_shape()[1]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable ({error}); expected ILQL's heads") from error
    heads = ILQLHeads(width, vocabulary)
    load(heads, file)
    heads.q1 = heads.q2 = None  # type: ignore[assignment]  # decoding reads the targets and V
    return heads.to(device, dtype).eval().requires_grad_(False)
