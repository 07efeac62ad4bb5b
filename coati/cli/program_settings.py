"""What the parsers of the programs beside training return: their flags, checked and typed."""

from collections.abc import Sequence
from dataclasses import dataclass

from coati.cli.response_flags import JudgeSettings, ResponseSettings
from coati.cli.reward_flags import SlowRewardSettings
from coati.cli.sampler_flags import SamplerSettings
from coati.parallel.optimizer_table import DEFAULT


@dataclass(frozen=True)
class CompareSettings:
    """``coati compare``."""

    model_path: str
    start_path: str | None
    input: list[str]
    max_prompts: int | None
    output: str | None
    show: int
    conversation_template_config: str | None
    template_args: str | None
    trust_remote_code: bool
    beta_gen: float | None
    rm_path: str | None
    reward_functions: list[str]
    reward_weights: list[float] | None
    reward_timeout: float
    slow_rewards: SlowRewardSettings
    tie_margin: float
    max_length: int
    max_new_tokens: int
    batch_size: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True)
class MergeSettings:
    """``coati merge``."""

    model_path: str
    output_dir: str
    dtype: str
    conversation_template_config: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class ExportSettings:
    """``coati export``."""

    model_path: str
    output_dir: str
    dtype: str
    conversation_template_config: str | None
    trust_remote_code: bool
    max_new_tokens: int
    gguf: str | None
    push_to_hub: str | None


@dataclass(frozen=True)
class ChatSettings:
    """``coati chat``. ``io`` None: as the output is a terminal or not."""

    model_path: str
    tokenizer_path: str | None
    conversation_template_config: str | None
    template_args: str | None
    model_max_length: int
    max_new_tokens: int
    io: str | None
    prompt: list[str]
    trust_remote_code: bool
    quant: str | None
    beta_gen: float | None
    system_message: str | None
    prompt_file: str | None
    tools: str | None
    transcript: str | None
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class PrepareSettings:
    """``coati prepare``. ``type`` None: only the template is checked. ``length_given``: whether
    ``max_length`` was written, or is the default."""

    type: str | None
    data_input_dirs: list[str]
    format: str | None
    columns: dict[str, str]
    strict_columns: bool
    split: str | None
    tokenizer_dir: str
    trust_remote_code: bool
    conversation_template_config: str | None
    template_mode: str
    template_args: str | None
    thoughts: str
    empty_thoughts: str
    learn: str
    check_template: bool
    data_cache_dir: str
    data_jsonl_output_dir: str
    data_arrow_output_dir: str
    max_length: int
    num_spliced_dataset_bins: int
    num_samples_per_datafile: int
    seed: int
    num_proc: int | None
    strict: bool
    max_bad_ratio: float
    eval_ratio: float
    eval_input_dirs: list[str]
    deduplicate: bool
    near_duplicates: float | None
    drop_eval_overlap: bool
    benchmark_files: list[str]
    overlap_words: int
    min_answer_chars: int
    max_answer_chars: int | None
    drop_trivial_answers: bool
    documents: str | None = None
    add_tokens: Sequence[str] = ()
    length_given: bool = True


@dataclass(frozen=True)
class PromptSampleSettings:
    """``coati sample-prompts``."""

    dataset_path: str
    save_path: str
    sample_size: int
    seed: int
    columns: Sequence[str] = ()
    strict_columns: bool = False


@dataclass(frozen=True)
class FitSettings:
    """``coati fit``. ``memory``: bytes of one GPU; with ``table`` neither it nor ``model`` is
    needed."""

    model: str | None
    memory: float | None
    gpus: int
    method: str
    teacher: str | None
    max_length: int
    lora_rank: int
    quantize_base: str | None
    table: bool
    optim: str = DEFAULT
    offload_activations: bool = False
    tokens_per_batch: int | None = None


@dataclass(frozen=True)
class QuantizeSettings:
    """``coati quantize``."""

    model_path: str
    output_dir: str
    method: list[str]
    calibration: list[str]
    calibration_rows: int
    group_size: int
    eval: list[str]
    max_length: int
    new_tokens: int
    output: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class BenchmarkSettings:
    """``coati measure``."""

    model_path: str
    quant: list[str]
    batch_size: list[int]
    prompt_tokens: int
    new_tokens: int
    output: str | None
    trust_remote_code: bool
    beta_gen: float | None


@dataclass(frozen=True)
class ScoreSettings:
    """``coati score``."""

    model_path: str
    input: list[str]
    output: str | None
    histogram: str | None
    batch_size: int
    max_length: int
    conversation_template_config: str | None
    template_args: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class ReportSettings:
    """``coati report``. ``output`` None: beside the run, or of several in the working directory."""

    run_dir: list[str]
    output: str | None


@dataclass(frozen=True)
class RolloutServerSettings:
    """``coati rollout-server``. ``token`` None: no authentication."""

    model_path: str
    engine: str
    http_host: str
    http_port: int
    dtype: str
    max_length: int | None
    token_env: str | None
    trust_remote_code: bool
    tensor_parallel: int
    vllm_memory_share: float | None
    vllm_args: list[str]
    token: str | None


@dataclass(frozen=True)
class ServerSettings:
    """``coati serve``. ``token`` None: no authentication."""

    model_path: str
    tokenizer_path: str | None
    conversation_template_config: str | None
    template_args: str | None
    served_model_name: str
    trust_remote_code: bool
    quant: str | None
    beta_gen: float | None
    http_host: str
    http_port: int
    token_file: str | None
    cors_origins: tuple[str, ...]
    profanity_file: str | None
    model_max_length: int | None
    max_new_tokens: int | None
    max_batch: int
    max_queue: int
    timeout: float
    shutdown_timeout: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    token: str | None


@dataclass(frozen=True)
class SampleSettings:
    """``coati sample``."""

    sampler: SamplerSettings
    responses: ResponseSettings
    judge: JudgeSettings
    input: list[str]
    max_prompts: int | None
    num_samples: int
    output_dir: str
    write: list[str]
    threshold: float | None
    keep: int | None
    margin: float
    keep_truncated: bool


@dataclass(frozen=True)
class EvaluateSettings:
    """``coati evaluate``. ``pass_at`` empty: 1 and ``num_samples``; ``stride`` None: half of
    ``max_length``; ``right_from`` None: what is right is told by gt_answer."""

    sampler: SamplerSettings
    responses: ResponseSettings
    judge: JudgeSettings
    output_dir: str
    baseline: str | None
    input: list[str]
    max_prompts: int | None
    num_samples: int
    pass_at: list[int]
    right_from: float | None
    perplexity: list[str]
    documents: str | None
    stride: int | None
    lm_eval: list[str]
    lm_eval_path: str | None
    lm_eval_limit: int | None
    few_shot: int | None
    lm_eval_chat: bool
