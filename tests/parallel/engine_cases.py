"""What the ranks of test_matrix.py do: tiny models trained by the library's engine, saved, resumed;
and plain PyTorch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from coati.models.embedding_noise import EmbeddingNoise
from coati.models.head_outputs import HeadRequest
from coati.parallel.objective import Objective
from coati.parallel.optimizer import OptimizerSettings, build_optimizer
from coati.parallel.options import ParallelOptions
from coati.trainer.sft import SFTObjective
from tests.tiny import tiny_llama

STEPS, SAVED_AT, ROWS, LR, CLIP = 4, 2, 8, 5e-3, 0.5
SEED = 42
LENGTHS = (16, 24, 10, 32)  # of each step: pipelines and caches must not remember the first


@dataclass(frozen=True)
class Case:
    """Options of the plugin, and the model: ``family`` of :data:`FAMILIES`, tied or not, with
    adapters or not, of the experts as well or not, ``adapter``: their other settings; ``bonus``:
    the coefficient of an entropy bonus; ``weighted``: tokens have weights; ``embedding_lr``: of
    embedding and head, if they have their own; ``optim``: of ``--optim``; ``token_loss``: of
    ``--sft_loss``; ``noise``: alpha of NEFTune."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    tied: bool = False
    lora: bool = False
    experts: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    bonus: float = 0.0
    weighted: bool = False
    embedding_lr: float | None = None
    optim: str = "adamw"
    token_loss: str = "nll"
    noise: float | None = None
    vocab_size: int = 384


def tiny_qwen2(tie: bool, vocab_size: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
    )
    return Qwen2ForCausalLM(config)


def tiny_opt(tie: bool, vocab_size: int):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        word_embed_proj_dim=64,
        dropout=0.0,
        tie_word_embeddings=tie,
    )
    return OPTForCausalLM(config)


def tiny_bloom(tie: bool, vocab_size: int):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        hidden_size=64, n_layer=2, n_head=4, vocab_size=vocab_size, tie_word_embeddings=tie
    )
    return BloomForCausalLM(config)


def of_the_table(family: str):
    """The tiny model of docs/models.md, in which windows, sinks and experts matter."""
    from tests.models_table.families import BY_TYPE, tiny_model

    return lambda tie, vocab_size: tiny_model(BY_TYPE[family], vocab_size=vocab_size)


FAMILIES = {
    **{name: of_the_table(name) for name in ("qwen3", "gemma3_text", "gpt_oss", "qwen3_moe")},
    "llama": lambda tie, vocab_size: tiny_llama(tie=tie, vocab_size=vocab_size),
    "qwen2": tiny_qwen2,
    "opt": tiny_opt,
    "bloom": tiny_bloom,
}


def build_model(case: Case, eager: bool = False):
    torch.manual_seed(0)
    model = FAMILIES[case.family](case.tied, case.vocab_size)
    if eager:
        model.config._attn_implementation = "eager"
    return model


def with_adapters(model, case: Case):
    from coati.models.lora.lora import LoraConfig, apply_lora

    config = LoraConfig(r=4, linear_lora_dropout=0.0, lora_experts=case.experts, **case.adapter)
    return apply_lora(model, config)


def window(step: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """ROWS rows of unequal lengths and unequal numbers of supervised tokens, the same for every
    run."""
    generator, width = torch.Generator().manual_seed(step), LENGTHS[step % len(LENGTHS)]
    ids = torch.randint(3, vocab_size, (ROWS, width), generator=generator)
    lengths = torch.randint(5, width + 1, (ROWS,), generator=generator)
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def weighted(batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """``batch`` with a weight for each token: 0 for some, and no row's mean is another one's."""
    generator = torch.Generator().manual_seed(100 + step)
    weights = torch.rand(batch["labels"].shape, generator=generator)
    return batch | {"loss_weights": weights.masked_fill(weights < 0.2, 0.0)}


def plain_run(case: Case) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of plain PyTorch: one process, fp32, whole windows, full logits."""
    model = build_model(case)
    if case.lora:
        model = with_adapters(model, case)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    own = own if case.embedding_lr else set()
    rates = [LR, case.embedding_lr or LR]
    groups = [[p for p in parameters if p not in own], [p for p in parameters if p in own]]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    if case.optim != "adamw":
        settings = OptimizerSettings(lr=LR, optim=case.optim)
        optimizer = build_optimizer(model, ParallelOptions(plugin="ddp"), settings)
        rates = [LR] * len(optimizer.param_groups)
    if case.noise:
        EmbeddingNoise(model, case.noise, SEED, lambda: step)
    losses, norms = [], []
    for step in range(STEPS):
        batch = window(step, case.vocab_size)
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * rate(step)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
        if case.weighted:
            weights = weighted(batch, step)["loss_weights"][:, 1:].flatten()[labels != -100]
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
            loss = (each[labels != -100] * weights).sum() / weights.sum()
        if case.token_loss == "dft":
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
            each = each[labels != -100]
            loss = ((-each).exp().detach() * each).mean()
        if case.bonus:
            rows = logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
            loss = loss + case.bonus * (rows.exp() * rows).sum(-1).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms


def rate(step: int) -> float:
    """The factor of the learning rate at ``step`` of a schedule of 10 steps without warm-up."""
    import math

    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10))


class CrossEntropy(Objective):
    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def head_request(self, batch):
        return HeadRequest(entropy=True) if self.bonus else None

    def loss(self, logps, batch):
        if not self.bonus:
            return -logps.sum(), {}
        return -(logps.logps + self.bonus * logps.entropy).sum(), {}


def _engine(case: Case, model):
    from coati.parallel.boost import boost
    from coati.parallel.plugins import ParallelOptions

    values = {
        "grad_clip": CLIP,
        "accumulation_steps": case.accumulation,
        "lora": case.lora,
        "quantize_base": case.adapter.get("quantize_base"),
        "use_dora": case.adapter.get("use_dora", False),
    } | case.options
    rates = {"lr": LR, "embedding_lr": case.embedding_lr, "optim": case.optim}
    engine = boost(model, ParallelOptions(**values), total_steps=10, warmup_steps=0, **rates)
    if case.noise:
        EmbeddingNoise(engine.module, case.noise, SEED, lambda: engine.lr_scheduler.last_epoch)
    return engine


def _mine(engine, batch: dict, accumulation: int) -> list[dict]:
    """This rank's micro-batches of the window, as GlobalBatchLoader deals them, padded for a split
    sequence."""
    multiple = engine.options.sequence_multiple
    extra = -batch["input_ids"].shape[1] % multiple
    batch = {k: F.pad(v, (0, extra), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    rows = ROWS // (accumulation * engine.mesh.dp_size)
    parts = {
        k: v.reshape(accumulation, engine.mesh.dp_size, rows, -1)[:, engine.mesh.dp_rank]
        for k, v in batch.items()
    }
    return [{k: v[i] for k, v in parts.items()} for i in range(accumulation)]


def _train(engine, case: Case, first: int, last: int) -> list[tuple[float, float]]:
    results = []
    of_sft = case.weighted or case.token_loss != "nll"
    objective = SFTObjective(token_loss=case.token_loss) if of_sft else CrossEntropy(case.bonus)
    for index in range(first, last):
        batch = window(index, case.vocab_size)
        if case.weighted:
            batch = weighted(batch, index)
        step = engine.train_step(_mine(engine, batch, case.accumulation), objective)
        results.append((step.loss, step.grad_norm))
    return results


def _join() -> None:
    from coati.parallel.boost import prepare_colossalai
    from coati.parallel.launch import launch

    launch(seed=0, timeout_s=60)
    prepare_colossalai()


def train_and_save(cases: list[Case], folder: str) -> list[dict[str, Any]]:
    """Per case: results of all steps, with a checkpoint after SAVED_AT and the final model;
    evaluation in between."""
    _join()
    from coati.parallel.checkpoint import RunningState, save_checkpoint
    from coati.parallel.weights import ModelAssets, save_model

    reports = []
    for case in cases:
        model = build_model(case, eager=case.options.get("enable_sequence_parallelism", False))
        assets = ModelAssets.of(model)
        engine = _engine(case, with_adapters(model, case) if case.lora else model)
        steps = _train(engine, case, 0, SAVED_AT)
        place = Path(folder) / case.name
        save_checkpoint(place, engine, assets, RunningState(step=SAVED_AT))
        before = engine.evaluate(_mine(engine, window(7, case.vocab_size), 1), CrossEntropy()).loss
        steps += _train(engine, case, SAVED_AT, STEPS)
        after = engine.evaluate(_mine(engine, window(7, case.vocab_size), 1), CrossEntropy()).loss
        save_model(engine, place / "final", assets)
        reports.append({"steps": steps, "before": before, "after": after})
    return reports


def resume(cases: list[Case], folder: str) -> list[dict[str, Any]]:
    """Per case, in fresh processes: the steps after SAVED_AT from the checkpoint, and the final
    model again."""
    _join()
    from coati.models.loading import load_causal_lm
    from coati.models.lora.adapter_files import load_lora
    from coati.parallel.checkpoint import read_checkpoint, restore
    from coati.parallel.weights import ModelAssets, save_model

    reports = []
    for case in cases:
        place = Path(folder) / case.name
        checkpoint = place / f"epoch-0_step-{SAVED_AT}"
        eager = case.options.get("enable_sequence_parallelism", False)
        if case.lora:
            model = with_adapters(build_model(case), case)
            load_lora(model, checkpoint / "modeling")
        else:
            dtype = "fp32" if case.options.get("precision", "fp32") == "fp32" else "auto"
            attention = "eager" if eager else None
            model = load_causal_lm(
                checkpoint / "modeling", dtype=dtype, attn_implementation=attention
            )
        engine = _engine(case, model)
        exact = restore(checkpoint, engine, read_checkpoint(checkpoint))
        steps = _train(engine, case, SAVED_AT, STEPS)
        save_model(engine, place / "resumed", ModelAssets.of(build_model(case)))
        reports.append({"steps": steps, "exact": exact})
    return reports
