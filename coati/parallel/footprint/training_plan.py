"""What is trained and how: all that memory depends on beside the model's shape."""

from dataclasses import dataclass, field

from coati.parallel.footprint.layer_activations import FP32, LayerRun
from coati.parallel.footprint.model_shape import ModelShape
from coati.parallel.optimizer_table import DEFAULT as ADAMW
from coati.parallel.options import ParallelOptions
from coati.parallel.plugins import PLUGINS, Plugin

PAIRS = ("rm", "dpo", "orpo", "online_dpo")


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained and how.

    Attributes:
        method: "sft", "rm", "dpo", "orpo", "kto", "gkd", "ilql", "ppo", "grpo"
            or "online_dpo".
        options: plugin, precision (resolved), ``--tp``, ``--grad_checkpoint`` and so on.
        processes: of the run.
        batch_size: rows (pairs) of a micro-batch of one process; with rollouts, responses
            (of online DPO pairs) of one.
        length: tokens of a row, its padding or the pack included.
        supervised: share of the tokens that the loss is computed for.
        lora_rank: 0: all weights are trained. ``lora_targets``: names of the adapted layers; None:
            every linear layer. ``lora_dropout``: their inputs are dropped out.
        quantize_base: how the frozen base is stored, a key of BASES; None: as it is.
        dora: adapters have magnitudes of their own.
        reference: a frozen copy of the policy is held.
        reward_model: a frozen model with a scalar head is held, of the policy's size.
        teacher: a frozen model is held that the policy is compared with token by token.
        offload_inference: these two are in host memory while idle.
        rollout_rows: responses sampled at once; 0: no rollouts.
        forward_rows: rows of a forward pass without gradient.
        on_gpu: the accelerator's memory is meant, else that of the host.
        optim: name of :data:`~coati.parallel.optimizer_table.OPTIMIZERS`.
    """

    method: str = "sft"
    options: ParallelOptions = field(default_factory=ParallelOptions)
    processes: int = 1
    batch_size: int = 1
    length: int = 512
    supervised: float = 1.0
    lora_rank: int = 0
    lora_targets: frozenset[str] | None = None
    lora_dropout: bool = False
    quantize_base: str | None = None
    dora: bool = False
    reference: bool = False
    reward_model: bool = False
    teacher: ModelShape | None = None
    offload_inference: bool = False
    rollout_rows: int = 0
    forward_rows: int = 0
    on_gpu: bool = False
    optim: str = ADAMW

    @property
    def plugin(self) -> Plugin:
        """The plugin's row."""
        return PLUGINS[self.options.plugin]

    @property
    def shares(self) -> int:
        """Processes that read different rows."""
        return max(self.processes // self.options.model_parallel_size, 1)

    @property
    def rows(self) -> int:
        """Rows of a forward pass with gradient; with a budget of tokens, of the longest."""
        rows = self._batch_rows
        options = self.options
        if options.tokens_per_batch is not None:
            together = 2 if self.method in PAIRS else 1
            held = max(options.tokens_per_batch // self.length // together, 1) * together
            return min(held, rows * options.accumulation_steps)
        if options.pp == 1:
            return rows
        # A stage holds as many micro-batches as there are stages.
        return min(options.microbatch_size * options.pp, rows)

    @property
    def _batch_rows(self) -> int:
        return 2 * self.batch_size if self.method in PAIRS else self.batch_size

    @property
    def rows_without_gradient(self) -> int:
        """Rows of a forward pass without gradient; a teacher's is not cut by tokens."""
        if self.options.tokens_per_batch is not None and self.teacher is None:
            return self.rows
        return self.forward_rows or self.rows

    @property
    def tokens(self) -> float:
        """Tokens of a forward pass with gradient, per process."""
        return self.rows * self.length / self.options.sp

    @property
    def step_tokens(self) -> float:
        """Tokens of all micro-batches of an optimizer step, per process."""
        rows = self._batch_rows * max(self.options.accumulation_steps, 1)
        return rows * self.length / self.options.sp

    def layer_run(self, scalar: bool = False) -> LayerRun:
        """How a layer runs. ``scalar``: below a scalar head, which takes padded rows."""
        half = self.options.precision != "fp32"
        free = not (self.on_gpu or scalar) and "cpu" in self.plugin.padding_free
        free = free and self.options.tp == 1
        flash = self.on_gpu and self.options.use_flash_attn
        return LayerRun(
            weight=2 if half and not self.plugin.fp32_weights else FP32,
            compute=2 if half else FP32,
            trained=not self.lora_rank,
            lora_rank=self.lora_rank,
            targets=self.lora_targets,
            dropout=self.lora_dropout,
            quantized=self.quantize_base is not None,
            dora=self.dora,
            attention="flash" if flash else "sdpa",
            padding_free=free,
            repeats_keys=not flash,
            on_gpu=self.on_gpu,
            fused=not (self.on_gpu or half) and self.options.kernels == "auto",
        )
