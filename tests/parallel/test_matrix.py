"""Every plugin, precision and variant on real processes: trains as plain PyTorch does, saves what
transformers loads, resumes to the bit. One launch trains all cases of a plugin's layout, a second,
fresh one resumes them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from coati.models.lora.quantized_base import round_base
from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run
from tests.parallel.engine_cases import (
    SAVED_AT,
    Case,
    build_model,
    plain_run,
    window,
    with_adapters,
)

pytestmark = pytest.mark.matrix

SHARDED = {
    "min_chunk_size_m": 0.02,
    "search_range_m": 0.05,
    "hidden_dim": 64,
}  # else a tiny model is never sharded


def cases(plugin: str, shared: dict, variants: dict[str, dict]) -> list[Case]:
    """``variants``: name -> fields of Case beside or inside ``options``."""
    fields = {"family", "tied", "lora", "experts", "accumulation", "vocab_size", "bonus"}
    fields |= {"weighted", "embedding_lr", "adapter"}
    return [
        Case(
            name,
            options={
                "plugin": plugin,
                **shared,
                **{k: v for k, v in values.items() if k not in fields},
            },
            **{k: v for k, v in values.items() if k in fields},
        )
        for name, values in variants.items()
    ]


BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}
CHECKPOINTING, TIED = {"checkpointing": {"grad_checkpoint": True}}, {"tied": {"tied": True}}
ACCUMULATION = {"accumulation": {"accumulation": 4}}
BONUS = {"entropy_bonus": {"bonus": 0.5}}
WEIGHTED = {"weighted": {"weighted": True, "accumulation": 2}}
RATE = {"embedding_lr": {"embedding_lr": 1e-2}}  # twice that of the rest
TIED_RATE = {"embedding_lr_tied": {"embedding_lr": 1e-3, "tied": True}}  # a fifth
PLAIN = {"plain": {}, **BONUS, **WEIGHTED, **ACCUMULATION, **CHECKPOINTING, **TIED, **RATE}
LORA = {"lora": {"lora": True}, "lora_bf16": {"lora": True, **BF16}}
NF4_DORA = {"quantize_base": "nf4", "use_dora": True, "use_rslora": True}
INT8 = {"quantize_base": "int8"}
QLORA = {
    "nf4_dora": {"lora": True, "adapter": NF4_DORA},
    "int8_bf16": {"lora": True, "adapter": INT8, **BF16},
}
HALF = {"bf16": BF16, "fp16": FP16, "bf16_accumulation": {**BF16, "accumulation": 2}}
SEQUENCE = {"enable_sequence_parallelism": True}
# Of ranks with rows of other lengths, and so with other numbers of micro-batches.
BUDGET = {"tokens_per_batch": {"tokens_per_batch": 40, "weighted": True}}

GROUPS: dict[str, tuple[int, list[Case]]] = {
    "ddp": (2, cases("ddp", {}, PLAIN | HALF | LORA | QLORA | BUDGET)),
    "zero2": (2, cases("zero2", {}, PLAIN | HALF | LORA | QLORA | BUDGET)),
    "zero2_cpu": (
        2,
        cases(
            "zero2_cpu",
            {},
            {"plain": {}, "bf16": BF16, **TIED, "lora": {"lora": True}, **QLORA, **RATE},
        ),
    ),
    "gemini": (
        2,
        cases(
            "gemini",
            BF16,
            PLAIN
            | {"fp16": FP16, "sharded": {"plugin_args": SHARDED}}
            | {"sharded_budget": {"plugin_args": SHARDED, **BUDGET["tokens_per_batch"]}}
            | {"sharded_accumulation": {"plugin_args": SHARDED, "accumulation": 2, "tied": True}},
        ),
    ),
    "gemini_auto": (
        2,
        cases("gemini_auto", BF16, {"plain": {}, "fp16": FP16, **CHECKPOINTING, **RATE}),
    ),
    "gemini_tp": (2, cases("gemini", {"tp": 2, **BF16}, {"plain": {}, **RATE})),
    "alone": (
        1,
        [
            *cases("ddp", {}, {"ddp": {}, "ddp_accumulation": {"accumulation": 4}}),
            *cases("zero2", {}, {"zero2": {}, "zero2_bf16": BF16}),
            *cases("zero2_cpu", {}, {"zero2_cpu": {}}),
            *cases("gemini", BF16, {"gemini": {}}),
            *cases("gemini_auto", BF16, {"gemini_auto": {}}),
            *cases("3d", {}, {"3d": {}, "3d_bf16": BF16, "3d_accumulation": {"accumulation": 4}}),
            *cases("3d", {"zero_stage": 1}, {"zero1": BF16, "zero1_fp16": FP16}),
            *cases("3d", {"zero_stage": 1} | BF16, {"zero1_accumulation": {"accumulation": 4}}),
            *cases("3d", {"zero_stage": 2}, {"stage2": BF16}),
        ],
    ),
    "3d_dp": (2, cases("3d", {}, PLAIN | HALF | LORA | QLORA | BUDGET)),
    "3d_zero1": (
        2,
        cases(
            "3d",
            {"zero_stage": 1, **BF16},
            {"plain": {}, "fp16": FP16, **ACCUMULATION, **RATE, **BUDGET},
        ),
    ),
    "3d_zero2": (
        2,
        cases("3d", {"zero_stage": 2, **BF16}, {"plain": {}, **ACCUMULATION, **RATE, **BUDGET}),
    ),
    "3d_tp": (
        2,
        cases("3d", {"tp": 2}, PLAIN | HALF | BUDGET | {"odd_vocabulary": {"vocab_size": 250}}),
    ),
    "3d_pp": (2, cases("3d", {"pp": 2, "microbatch_size": 2}, PLAIN | HALF | TIED_RATE)),
    "3d_pp_zero1": (
        2,
        cases("3d", {"pp": 2, "microbatch_size": 2, "zero_stage": 1, **BF16}, RATE | TIED_RATE),
    ),
    "3d_split_gather": (
        2,
        cases("3d", {"tp": 2, **SEQUENCE}, {"plain": {}, "bf16": BF16, **RATE, **BUDGET}),
    ),
    "3d_ring": (2, cases("3d", {"tp": 2, "sp_mode": "ring", **SEQUENCE}, {"plain": {}})),
    "3d_all_to_all": (
        2,
        cases("3d", {"sp": 2, "sp_mode": "all_to_all", **SEQUENCE}, {"plain": {}, **TIED, **RATE}),
    ),
    "3d_tp_pp": (
        4,
        cases("3d", {"tp": 2, "pp": 2, "microbatch_size": 2}, {"plain": {}, **TIED, **TIED_RATE}),
    ),
    "3d_tp_dp": (4, cases("3d", {"tp": 2}, {"plain": {}, "zero1": {"zero_stage": 1, **BF16}})),
    "3d_tp_families": (
        2,
        cases(
            "3d",
            {"tp": 2},
            {f: {"family": f, "tied": f != "bloom"} for f in ("qwen2", "opt", "bloom")},
        ),
    ),
    "3d_pp_families": (
        2,
        cases(
            "3d",
            {"pp": 2, "microbatch_size": 2},
            {f: {"family": f} for f in ("qwen2", "opt", "bloom")},
        ),
    ),
}
if transformers_major() >= 5:
    TODAY = {
        "qwen3": {"family": "qwen3"},
        "gemma3": {"family": "gemma3_text", "tied": True},
        "gpt_oss": {"family": "gpt_oss"},
    }
    EXPERTS = {
        f"lora_experts_{family}": {"family": family, "lora": True, "experts": True}
        for family in ("qwen3_moe", "gpt_oss")  # in and out the one way around and the other
    }
    SPLIT = {"tp": {"tp": 2}, "pp": {"pp": 2, "microbatch_size": 2}}
    PRECISE = {
        f"{name}_{how}": fields | more
        for name, fields in TODAY.items()
        for how, more in {"bf16": BF16, "fp16": FP16, **CHECKPOINTING}.items()
    }
    ZERO = {
        f"{name}_zero{stage}": fields | BF16 | {"zero_stage": stage}
        for name, fields in TODAY.items()
        for stage in (1, 2)
    }
    GROUPS |= {
        "3d_tp_today": (2, cases("3d", SPLIT["tp"], TODAY)),
        "3d_tp_today_precision": (2, cases("3d", SPLIT["tp"], PRECISE)),
        "3d_tp_zero_today": (4, cases("3d", SPLIT["tp"], ZERO)),
        "3d_tp_lora": (2, cases("3d", SPLIT["tp"], LORA | EXPERTS)),
        "3d_pp_today": (2, cases("3d", SPLIT["pp"], TODAY)),
        "3d_tp_pp_today": (4, cases("3d", SPLIT["tp"] | SPLIT["pp"], TODAY)),
    }


@pytest.mark.parametrize("group", GROUPS)
def test_trains_saves_and_resumes(group, tmp_path):
    nproc, members = GROUPS[group]
    first = run(
        nproc, "tests.parallel.engine_cases:train_and_save", members, str(tmp_path), timeout=400
    )
    second = run(nproc, "tests.parallel.engine_cases:resume", members, str(tmp_path), timeout=400)
    for index, case in enumerate(members):
        for rank in range(nproc):
            assert first[rank][index] == first[0][index], f"{case.name}: ranks disagree"
        check_against_plain(case, first[0][index]["steps"])
        check_resume(case, first[0][index], second[0][index], tmp_path / case.name)
        check_reload(case, first[0][index], tmp_path / case.name)


def check_against_plain(case: Case, steps: list[tuple[float, float]]) -> None:
    fp32 = case.options.get("precision", "fp32") == "fp32"
    losses, norms = plain_run(case)
    assert_close(
        [loss for loss, _ in steps],
        losses,
        rtol=1e-5 if fp32 else 2e-2,
        atol=0.0,
        msg=f"{case.name}: losses",
    )
    assert_close(
        [norm for _, norm in steps],
        norms,
        rtol=1e-4 if fp32 else 3e-2,
        atol=0.0,
        msg=f"{case.name}: norms",
    )


def check_resume(case: Case, first: dict, second: dict, place) -> None:
    assert second["exact"], case.name
    assert second["steps"] == first["steps"][SAVED_AT:], f"{case.name}: the resumed steps differ"
    for file in (place / "final").glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(place / "resumed" / file.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (
                f"{case.name}: {name} differs after the resume"
            )


@torch.no_grad()
def check_reload(case: Case, first: dict, place) -> None:
    """The saved directory, in plain transformers (or peft), has the loss that the engine had when
    it saved."""
    from transformers import AutoModelForCausalLM

    if case.lora:
        from peft import PeftModel

        base = build_model(case)
        if kind := case.adapter.get("quantize_base"):
            round_base(base, kind)
        model = PeftModel.from_pretrained(base, place / "final")
    else:
        model, report = AutoModelForCausalLM.from_pretrained(
            place / "final", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"], case.name
        assert model.config.tie_word_embeddings == case.tied
        assert model.get_output_embeddings().weight.shape[0] == case.vocab_size
    model.eval()
    batch = window(7, case.vocab_size)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.float()
    loss = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))
    fp32 = case.options.get("precision", "fp32") == "fp32"
    assert abs(loss - first["after"]) <= (2e-6 if fp32 else 5e-3) * abs(loss), (
        case.name,
        loss,
        first["after"],
    )
    assert first["before"] != first["after"]


def test_adapters_start_as_the_base_model():
    """The LoRA rows of the matrix compare with an adapted plain model; at the start that one is the
    base itself."""
    case = Case("lora", lora=True)
    batch = window(0, case.vocab_size)
    base, adapted = build_model(case).eval(), with_adapters(build_model(case), case).eval()
    with torch.no_grad():
        assert torch.equal(base(batch["input_ids"]).logits, adapted(batch["input_ids"]).logits)
