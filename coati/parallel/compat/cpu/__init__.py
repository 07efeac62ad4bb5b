"""ColossalAI on machines without an accelerator: gloo, system memory, plain torch in place of CUDA
kernels."""

import torch

from coati.parallel.compat.cpu.patches import CPU_PATCHES
from coati.parallel.compat.import_colossalai import import_colossalai
from coati.parallel.compat.patch import apply_all

__all__ = ["CPU_PATCHES", "apply"]


def apply() -> list[str]:
    """Make ColossalAI run on this CPU; nothing happens where CUDA is available.

    Idempotent; call it before a process group or a plugin is built. Returns the names of the
    patches applied now.
    """
    if torch.cuda.is_available():
        return []
    import_colossalai()
    return apply_all(CPU_PATCHES)
