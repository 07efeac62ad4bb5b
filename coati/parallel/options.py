"""The parallel flags as one value. Imports neither torch nor ColossalAI."""

from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("fp32", "fp16", "bf16")
SP_MODES = ("split_gather", "ring", "all_to_all", "ring_attn")
# ColossalAI clips, and knows the gradient norm, only with a positive limit: this one never binds.
NO_CLIPPING = 1e30


@dataclass(frozen=True)
class ParallelOptions:
    """Named values of the parallel flags (``--plugin``, ``--tp``, ...), independent of any
    parser."""

    plugin: str = "zero2"
    precision: str | None = "fp32"  # None: follows the machine, decided later
    tp: int = 1
    pp: int = 1
    sp: int = 1
    sp_mode: str = "split_gather"
    enable_sequence_parallelism: bool = False
    zero_stage: int = 0
    zero_cpu_offload: bool = False
    grad_clip: float = 1.0
    accumulation_steps: int = 1
    batch_size: int | None = None
    microbatch_size: int = 1
    tokens_per_batch: int | None = None
    grad_checkpoint: bool = False
    offload_activations: bool = False
    use_flash_attn: bool = False
    kernels: str = "auto"
    lora: bool = False
    use_dora: bool = False
    quantize_base: str | None = None
    packing: bool = False
    plugin_args: dict[str, Any] = field(default_factory=dict)

    @property
    def max_norm(self) -> float:
        """``grad_clip`` as ColossalAI takes it: positive, so that the gradient norm is known."""
        return self.grad_clip if self.grad_clip and self.grad_clip > 0 else NO_CLIPPING

    @property
    def accumulates(self) -> bool:
        """Whether several backward passes can come before a step."""
        return self.accumulation_steps > 1 or self.tokens_per_batch is not None

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one copy of the data: tp x pp x sp."""
        return self.tp * self.pp * self.sp

    @property
    def needs_hybrid(self) -> bool:
        """Whether a flag is given that asks for a model split in several ways (plugin 3d)."""
        split = self.tp > 1 or self.pp > 1 or self.sp > 1
        return split or self.enable_sequence_parallelism or self.zero_stage > 0

    @property
    def sequence_multiple(self) -> int:
        """What every padded length must be a multiple of."""
        if not self.enable_sequence_parallelism:
            return 1
        return self.tp if self.sp_mode in ("split_gather", "ring") else self.sp
