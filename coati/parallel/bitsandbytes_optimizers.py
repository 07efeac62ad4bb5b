"""bitsandbytes' optimizers, with what the library adds: the bits of a group's states, and paged
states that are paged again after a resume. Imports bitsandbytes."""

from typing import Any

import bitsandbytes
import torch

STATES = ("state1", "state2")


class _Grouped:
    """A parameter group's ``optim_bits`` is that of its states."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of one parameter."""
        config = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        config["optim_bits"] = group.get("optim_bits", config["optim_bits"])
        return config


class AdamW8bit(_Grouped, bitsandbytes.optim.AdamW8bit):
    """AdamW with block-wise quantized moments (arXiv 2110.02861)."""


class PagedAdamW8bit(_Grouped, bitsandbytes.optim.PagedAdamW8bit):
    """:class:`AdamW8bit` whose states are in memory that CUDA moves between GPU and host."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As the base class, which leaves the states in plain GPU memory."""
        super().load_state_dict(state_dict, move_to_device)
        for parameter, state in self.state.items():
            for name in STATES:
                if (value := state.get(name)) is not None:
                    buffer = self.get_state_buffer(parameter, dtype=value.dtype)
                    state[name] = buffer.copy_(value)


class Lion(bitsandbytes.optim.Lion):
    """Lion (arXiv 2302.06675) with an fp32 momentum."""


def works_on(kind: type[Any], device: str) -> str | None:
    """Why an optimizer of class ``kind`` cannot take a step on ``device``; None where it can."""
    parameter = torch.nn.Parameter(torch.ones(4096, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        kind([parameter], lr=1.0).step()
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    moved = bool((parameter != 1).all())
    return None if moved else "a step changed nothing"
