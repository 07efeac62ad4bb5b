"""What the parsers of the training scripts return: frozen dataclasses, one a flag group.

A field has the name of its flag. Groups that a lower package consumes live there
(:class:`~coati.parallel.optimizer.OptimizerSettings`, ...); those of the recipes are here.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

from coati.cli.launch_flags import LaunchSettings
from coati.dataset.chat.row_options import EMPTY_THOUGHTS, LEARNED_TURNS, THOUGHTS, RowOptions
from coati.dataset.rows.column_names import Layout, parse_columns
from coati.dataset.rows.row_errors import DEFAULT_BAD_RATIO
from coati.models.loss_registry import NLL
from coati.parallel.optimizer import OptimizerSettings
from coati.parallel.options import ParallelOptions
from coati.trainer.schedule import RunSchedule

T = TypeVar("T")


def filled(kind: type[T], flags: Mapping[str, Any], /, **given: Any) -> T:
    """A ``kind`` whose fields are ``given``, groups filled likewise, or the flags of their names.

    A field without a flag keeps its default. Raises TypeError for one that has none.
    """
    hints = get_type_hints(kind)
    values = dict(given)
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name in given:
            continue
        if is_dataclass(hints[each.name]):
            values[each.name] = filled(hints[each.name], flags)
        elif each.name in flags:
            values[each.name] = flags[each.name]
    return kind(**values)


def settings_of(kind: type[T], args: Namespace, **given: Any) -> T:
    """The settings of a script from its checked flags; ``given`` as in :func:`filled`."""
    flags = {name: value for name, value in vars(args).items() if not name.startswith("_")}
    chosen = getattr(args, "_given", [])
    written = getattr(args, "_written", [])
    return filled(kind, flags, flags=flags, flags_given=chosen, flags_written=written, **given)


@dataclass(frozen=True)
class ModelSettings:
    """The model that is trained, as it is loaded."""

    pretrain: str
    tokenizer_dir: str | None = None
    trust_remote_code: bool = False
    use_flash_attn: bool = False
    add_tokens: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer_dir or self.pretrain


@dataclass(frozen=True)
class LoraSettings:
    """``lora_rank`` 0: no adapters. ``lora_config``: a JSON file, which the others override;
    ``lora_target``: a word of TARGETS (cli/lora_flags.py), or a file of names."""

    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_train_bias: str | None = None
    lora_config: str | None = None
    lora_experts: bool = False
    lora_target: str | None = None
    use_dora: bool = False
    use_rslora: bool = False
    quantize_base: str | None = None
    merge_lora_weights: bool = False
    shared_base: bool = False

    @property
    def saves_adapter(self) -> bool:
        """Whether the final model is an adapter, not a whole model."""
        return bool(self.lora_rank) and not self.merge_lora_weights


@dataclass(frozen=True)
class StreamSettings:
    """Rows that are tokenized while a run trains. ``stream_workers`` None: by the cores."""

    streaming: bool = False
    shuffle_buffer: int = 10_000
    stream_workers: int | None = None


@dataclass(frozen=True)
class DataSettings:
    """The rows of a run. ``max_seq_len``: room that a prompt leaves for its response;
    ``documents``: what of a .txt file is one; ``max_bad_ratio``: share of raw rows that may be
    malformed."""

    dataset: list[str]
    eval_dataset: list[str]
    dataset_weights: list[float]
    max_length: int
    conversation_template_config: str | None = None
    template_args: str | None = None  # a JSON object
    thoughts: str = THOUGHTS[0]
    empty_thoughts: str = EMPTY_THOUGHTS[0]
    learn: str = LEARNED_TURNS[0]
    max_samples: int | None = None
    eval_ratio: float | None = None
    disable_loss_mask: bool = False
    packing: bool = False
    max_seq_len: int = 0
    max_bad_ratio: float = DEFAULT_BAD_RATIO
    stream: StreamSettings = field(default_factory=StreamSettings)
    documents: str | None = None
    columns: list[str] = field(default_factory=list)  # NAME=COLUMN
    strict_columns: bool = False

    @property
    def layout(self) -> Layout:
        """What the columns of raw rows are."""
        return Layout(parse_columns(self.columns))

    @property
    def row_options(self) -> RowOptions:
        """What is learned of raw rows."""
        return RowOptions(self.thoughts, self.empty_thoughts, self.learn)

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leaves room for its response."""
        return self.max_length - self.max_seq_len

    @property
    def pack_length(self) -> int | None:
        """Tokens of a pack; None without ``--packing``."""
        return self.max_length if self.packing else None


@dataclass(frozen=True)
class BatchSettings:
    """Rows of a batch and a process, batches of an optimizer step, epochs of a run."""

    batch_size: int
    accumulation_steps: int
    max_epochs: int
    eval_batch_size: int | None = None

    @property
    def evaluation(self) -> int:
        """Rows of an evaluation batch."""
        return self.eval_batch_size or self.batch_size


@dataclass(frozen=True)
class OutputSettings:
    """Where a run writes, and what it goes on from."""

    save_dir: str
    checkpoint_path: str | None = None
    checkpoint_weights_only: bool = False
    config_file: str | None = None
    dry_run: bool = False
    log_dir: str | None = None
    use_wandb: bool = False
    report_to: list[str] = field(default_factory=list)
    push_to_hub: str | None = None

    @property
    def trackers(self) -> dict[str, Any]:
        """Keywords of a trainer's ``fit``."""
        return {
            "log_dir": self.log_dir,
            "use_wandb": self.use_wandb,
            "report_to": self.report_to,
        }


@dataclass(frozen=True)
class ReferenceSettings:
    """The reference model of a preference run."""

    disable_reference_model: bool = False
    ref_tp: int | None = None
    precompute_ref: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training script is told.

    ``plugin``: as asked for; None follows the machine, and ``parallel.plugin`` then says nothing.
    ``flags``: every resolved flag by name, for arguments.json, ``--dry_run`` and trackers;
    ``flags_given``: the names of those that were not left at their default; ``flags_written``: of
    those that stand in the command or its configuration file. ``whole_weights``: no plugin that
    shards them is a default.
    """

    whole_weights: ClassVar[bool] = False
    model: ModelSettings
    data: DataSettings
    lora: LoraSettings
    plugin: str | None
    parallel: ParallelOptions
    optimizer: OptimizerSettings
    schedule: RunSchedule
    output: OutputSettings
    launch: LaunchSettings
    seed: int
    flags: Mapping[str, Any]
    flags_given: Sequence[str] = ()
    flags_written: Sequence[str] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True)
class SLSettings(TrainingSettings):
    """What the trainers on fixed data share."""

    batches: BatchSettings


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a token, and NEFTune's alpha: noise on the embeddings; None: none."""

    sft_loss: str = NLL
    neftune_alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class SFTSettings(SLSettings):
    """``coati sft`` and ``coati pretrain``."""

    loss: TokenLoss


@dataclass(frozen=True)
class RewardLoss:
    """Options of the reward model's loss."""

    loss_fn: str
    center_coef: float


@dataclass(frozen=True, kw_only=True)
class RMSettings(SLSettings):
    """``coati rm``."""

    loss: RewardLoss


@dataclass(frozen=True)
class DPOLoss:
    """The pairwise losses of a run; ``beta`` and ``gamma`` None: each loss has its own."""

    loss_type: list[str]
    loss_weights: list[float] | None
    beta: float | None
    gamma: float | None
    label_smoothing: float
    length_normalization: bool
    sft_coef: float
    ld_alpha: float | None


@dataclass(frozen=True)
class OfflineDPOLoss(DPOLoss):
    """Those of pairs that others wrote. ``wpo``: weighed by the policy's probability."""

    wpo: bool = False


@dataclass(frozen=True)
class OnlineDPOLoss(DPOLoss):
    """Those of online DPO: ``beta`` goes through several values."""

    beta: list[float] | None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class DPOSettings(SLSettings):
    """``coati dpo``."""

    loss: OfflineDPOLoss
    reference: ReferenceSettings


@dataclass(frozen=True, kw_only=True)
class ORPOSettings(SLSettings):
    """``coati orpo``. ``lam``: weight of the odds ratio."""

    lam: float


@dataclass(frozen=True)
class KTOLoss:
    """Options of KTO's loss."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


@dataclass(frozen=True, kw_only=True)
class KTOSettings(SLSettings):
    """``coati kto``. ``auto_weight``: balance the two kinds of responses."""

    loss: KTOLoss
    auto_weight: bool
    reference: ReferenceSettings


@dataclass(frozen=True)
class ILQLLossFlags:
    """Coefficients of ILQL's losses, fields of :class:`coati.models.ilql_loss.ILQLLoss`."""

    tau: float
    gamma: float
    cql_coef: float
    awac_coef: float
    awac_beta: float


@dataclass(frozen=True, kw_only=True)
class ILQLSettings(SLSettings):
    """``coati ilql``. ``target_alpha``, ``target_interval``: how the targets follow."""

    whole_weights: ClassVar[bool] = True
    loss: ILQLLossFlags
    target_alpha: float
    target_interval: int
