"""What decides a rank's next step and is in no weights file: optimizer, fp32 masters, loss scale,
random states."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.parallel.engine import Engine
from coati.parallel.optimizer import grad_scaler
from coati.parallel.plugins import PLUGINS
from coati.utils.distributed import rank

# ColossalAI's own state_dict leaves out the two counters.
SCALER_FIELDS = ("_scale", "_growth_step", "_hysteresis_step")


def rank_state(engine: Engine) -> dict[str, Any]:
    """Everything of this rank that decides its next step and is not in ``modeling``."""
    optimizer = engine.optimizer
    scaler = grad_scaler(optimizer)
    amp = getattr(optimizer, "scaler", None)
    return {
        "masters": [tensor.detach().cpu().clone() for tensor in master_tensors(engine)],
        "optimizer": optimizer.optim.state_dict(),
        "scaler": None
        if scaler is None
        else {name: getattr(scaler, name) for name in SCALER_FIELDS},
        "amp": None if amp is None else amp.state_dict(),
        "random": random_state(),
    }


def load_rank_state(engine: Engine, state: dict[str, Any]) -> None:
    """The inverse of :func:`rank_state`; the master weights come last, because loading weights
    rebuilt them. The optimizer's settings (learning rate, weight decay, betas) stay this run's."""
    optimizer = engine.optimizer
    scaler = grad_scaler(optimizer)
    amp = getattr(optimizer, "scaler", None)
    if scaler is not None:
        for name, value in state["scaler"].items():
            setattr(scaler, name, value.to(engine.device) if isinstance(value, Tensor) else value)
    if amp is not None:
        amp.load_state_dict(state["amp"])
    settings = _settings_of_groups(optimizer.optim)
    optimizer.optim.load_state_dict(state["optimizer"])
    for group, of_group in zip(optimizer.optim.param_groups, settings, strict=True):
        group.update(of_group)
    masters = master_tensors(engine)
    shapes = (
        [tuple(tensor.shape) for tensor in masters],
        [tuple(tensor.shape) for tensor in state["masters"]],
    )
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the optimizer state of rank {rank()} is of another model: shapes {shapes[1][:3]}..., "
            f"here {shapes[0][:3]}..."
        )
    for mine, saved in zip(masters, state["masters"], strict=True):
        mine.copy_(saved)
    with torch.no_grad():
        refresh_working_weights(optimizer)
    set_random_state(state["random"])


def _settings_of_groups(optimizer: Any) -> list[dict[str, Any]]:
    """What stands in each parameter group beside the parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def master_tensors(engine: Engine) -> list[Tensor]:
    """This rank's fp32 master weights, in an order that only depends on the model; none for plugin
    ddp, which saves whole weights."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "param_to_chunk16"):
        # Gemini: one payload for each chunk that this rank updates.
        chunks = dict.fromkeys(optimizer.param_to_chunk16.values())
        return [(chunk.paired_chunk or chunk).payload for chunk in chunks]
    if PLUGINS[engine.options.plugin].fp32_weights:
        return []
    return [
        parameter.data for group in optimizer.optim.param_groups for parameter in group["params"]
    ]


def refresh_working_weights(optimizer: Any) -> None:
    """The weights that the model computes with := the masters. Vocabulary rows that tensor
    parallelism padded on are in no weights file, and would otherwise differ after a resume."""
    if hasattr(optimizer, "param_to_chunk16"):
        for chunk in optimizer.chunk16_set:
            if chunk.paired_chunk is not None:
                chunk.optim_update()
    elif hasattr(optimizer, "_master_param_groups_of_current_rank"):
        from colossalai.zero.low_level._utils import all_gather_into_flat_tensor_nd

        for group, masters in optimizer._master_param_groups_of_current_rank.items():
            for working, master in zip(
                optimizer._working_param_groups[group], masters, strict=True
            ):
                padded = optimizer._working_param_to_padded_working_param[working]
                shard = master.to(working.device).to(working.dtype)
                all_gather_into_flat_tensor_nd(padded, shard, optimizer.param_to_pg[working])
    else:
        for working, master in getattr(optimizer, "working_to_master_map", {}).items():
            if working is not master:
                working.data.copy_(master)


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's, PyTorch's and ColossalAI's tensor-parallel generators, readable
    with weights_only."""
    state: Any = np.random.get_state()
    _, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for cuda in state["cuda"]:
        torch.cuda.set_rng_state(cuda)
