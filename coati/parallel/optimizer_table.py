"""The optimizers of ``--optim``, one row each: what it holds, and where it cannot work.

What depends on an optimizer reads a field of its row, so that one more is a row here and how it is
made in :mod:`coati.parallel.optimizer`. Imports neither torch nor ColossalAI.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from coati.parallel.options import ParallelOptions
from coati.parallel.plugins import PLUGINS
from coati.utils.packages import release_of

DEFAULT = "adamw"
BITSANDBYTES = "bitsandbytes>=0.50"  # the first release tested whose optimizers run on CPUs too


@dataclass(frozen=True)
class OptimizerRow:
    """One row of :data:`OPTIMIZERS`. A field that is left out says what AdamW does.

    Attributes:
        about: for the help and docs.
        weight_bytes: of its states, for each element of a weight.
        embedding_bytes: the same for an input embedding; None: as for a weight.
        head_bytes: the same for a vocabulary head that is not the embedding.
        step_bytes: of temporary tensors in a step, for each element of the largest weight.
        cpu_step_bytes: the same on a CPU, where there is no kernel that works in place.
        beta2: it has a second moment whose decay rate ``--adam_beta2`` sets.
        whole: it looks at whole matrices, not at shards of them; ``because`` says why.
        package: what has to be installed for it.
        torch: the first release of torch that has it.
        cuda: it is a GPU's alone.
    """

    about: str
    weight_bytes: float = 8.0
    embedding_bytes: float | None = None
    head_bytes: float | None = None
    step_bytes: float = 0.0
    cpu_step_bytes: float = 0.0
    beta2: bool = True
    whole: bool = False
    because: str = ""
    package: str | None = None
    torch: tuple[int, ...] | None = None
    cuda: bool = False

    def state_bytes(self, weights: float, embedding: float = 0.0, head: float = 0.0) -> float:
        """Bytes of the states of so many elements, fp32 master weights not among them."""
        of_embedding = self.weight_bytes if self.embedding_bytes is None else self.embedding_bytes
        of_head = self.weight_bytes if self.head_bytes is None else self.head_bytes
        return self.weight_bytes * weights + of_embedding * embedding + of_head * head


# Both moments in one byte an element, and two fp32 scales for each block of 256
_BLOCKWISE = 2.0 + 2 * 4 / 256
_EIGHT_BIT: dict[str, Any] = {
    "weight_bytes": _BLOCKWISE,
    "embedding_bytes": 8.0,
    "cpu_step_bytes": 20.0,
    "package": BITSANDBYTES,
}

OPTIMIZERS: dict[str, OptimizerRow] = {
    DEFAULT: OptimizerRow("AdamW (arXiv 1711.05101): two moments in fp32"),
    "adamw8bit": OptimizerRow(
        "AdamW with moments in 8 bits (arXiv 2110.02861), those of embeddings in 32",
        **_EIGHT_BIT,
    ),
    "paged_adamw8bit": OptimizerRow(
        "the same, whose states are moved to host memory when the GPU's runs out (CUDA alone)",
        **_EIGHT_BIT,
        cuda=True,
    ),
    "adafactor": OptimizerRow(
        "second moments as a row and a column of each matrix (arXiv 1804.04235), no first ones; a "
        "weight moves by --lr times its root mean square, so that 1e-3 to 1e-2 is usual",
        weight_bytes=0.0,
        step_bytes=4.0,
        cpu_step_bytes=4.0,
        beta2=False,
        whole=True,
        because="factors a matrix into a row and a column",
    ),
    "muon": OptimizerRow(
        "orthogonalized momentum for hidden matrices, scaled to the size of AdamW's steps (arXiv "
        "2502.16982); AdamW for embeddings, heads and vectors",
        weight_bytes=4.0,
        embedding_bytes=8.0,
        head_bytes=8.0,
        step_bytes=12.0,
        cpu_step_bytes=12.0,
        whole=True,
        because="orthogonalizes whole matrices",
        torch=(2, 9),
    ),
    "lion": OptimizerRow(
        "the sign of one momentum (arXiv 2302.06675), betas 0.9 and 0.99; wants a third to a tenth "
        "of AdamW's --lr, and as much more --weight_decay",
        weight_bytes=4.0,
        cpu_step_bytes=12.0,
        beta2=False,
        package=BITSANDBYTES,
    ),
}


def optimizer_problem(name: str, options: ParallelOptions) -> str | None:
    """Why the plugin of ``options`` (resolved) cannot train with ``--optim name``, and what to use
    instead; None where it can."""
    if name not in OPTIMIZERS:
        return f"--optim {name}: unknown; choose one of {', '.join(OPTIMIZERS)}"
    row = OPTIMIZERS[name]
    plugin = PLUGINS[options.plugin]
    if plugin.own_adam and name != DEFAULT:
        return (
            f"--optim {name}: --plugin {options.plugin} trains with ColossalAI's own Adam alone; "
            f"use --optim {DEFAULT}, or --plugin zero2 or ddp"
        )
    if row.whole and (plugin.shards_optimizer or options.zero_stage):
        stage = f" --zero_stage {options.zero_stage}" if options.zero_stage else ""
        return (
            f"--optim {name} {row.because}, and --plugin {options.plugin}{stage} gives it flat "
            "shards of them; use --plugin ddp, or 3d with --zero_stage 0"
        )
    if row.whole and options.tp > 1:
        return (
            f"--optim {name} {row.because}, and --tp {options.tp} splits them; use --tp 1, or "
            f"--optim {DEFAULT}"
        )
    if row.cuda and (plugin.host_optimizer or options.zero_cpu_offload):
        return (
            f"--optim {name} moves its states between GPU and host memory, where "
            f"{'--zero_cpu_offload' if options.zero_cpu_offload else '--plugin ' + options.plugin} "
            "has them always; use --optim adamw8bit"
        )
    return None


def installed_problem(name: str) -> str | None:
    """Why what is installed cannot train with ``--optim name``; None where it can."""
    row = OPTIMIZERS[name]
    if row.torch is not None and (found := release_of("torch")) is not None and found < row.torch:
        needed = ".".join(map(str, row.torch))
        return (
            f"--optim {name} came with torch {needed}, installed is "
            f"{'.'.join(map(str, found))}; use --optim {DEFAULT}, or a newer torch"
        )
    if row.package is not None and find_spec(row.package.split(">")[0]) is None:
        return (
            f"--optim {name} is that of {row.package.split('>')[0]}, which is not installed; run: "
            f"pip install '{row.package}'"
        )
    return None
