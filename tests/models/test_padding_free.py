"""Rows laid end to end give what padded rows give: log-probs, gradients, on either padding side."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coati.models import flash_varlen, sdpa
from coati.models import padding_free as padding_free_module
from coati.models.head import Head, scatter_token_logprobs
from coati.models.padding_free import PaddingFree, runs_varlen
from coati.models.sdpa import varlen_attention
from coati.utils.logging import forget_warnings
from coati.utils.transformers_compat import transformers_major
from tests.models_table.families import FAMILIES, known, tiny_model
from tests.tiny import tiny_llama

LENGTHS = (7, 1, 12, 4)
BY_TYPE = {family.type: family for family in FAMILIES if known(family) and not family.remote}


# Of transformers 5; those with layers that keep states, or an attention of their own, need padding.
PACKED_TODAY = set(BY_TYPE) - {
    "bamba",
    "bloom",
    "falcon",
    "falcon_h1",
    "deepseek_v4",
    "gemma2",
    "gpt_oss",
    "gptj",
    "granite_swa",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "stablelm",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
}
PACKED = {
    "deepseek_v3",
    "glm",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
}


def batch(side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Four rows of LENGTHS real tokens, padded with a real token's id; all but the first two tokens
    supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.full((4, 12), 5), torch.zeros(4, 12, dtype=torch.long)
    labels = torch.full((4, 12), -100)
    for row, length in enumerate(LENGTHS):
        start = 0 if side == "right" else 12 - length
        ids[row, start : start + length] = torch.randint(0, 384, (length,), generator=generator)
        mask[row, start : start + length] = 1
        labels[row, start + 2 : start + length] = ids[row, start + 2 : start + length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logprobs(model, rows: dict, padding_free: PaddingFree | None) -> torch.Tensor:
    """(B, S - 1) log-probs with or without padding."""
    head = Head.install(model)
    if padding_free is None:
        head.set(rows["labels"])
        positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs = {
            "input_ids": rows["input_ids"],
            "attention_mask": rows["attention_mask"],
            "position_ids": positions,
        }
    else:
        packed = padding_free.unpad(rows)
        head.set_targets(packed.targets)
        inputs = packed.inputs
    flat = model(**inputs, use_cache=False).logits
    head.remove()
    return scatter_token_logprobs(flat, rows["labels"])


def gradients(model, logps: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 2, logps.numel()).view_as(logps)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_padding(side, checkpointing):
    model = tiny_llama(tie=True)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows, padding_free = batch(side), PaddingFree.of(model)
    assert model.training  # the probe leaves the mode as it was
    padded, packed = logprobs(model, rows, None), logprobs(model, rows, padding_free)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    for found, expected in zip(gradients(model, packed), gradients(model, padded), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6)


def test_what_is_packed():
    rows = batch("left")
    packed = PaddingFree.of(tiny_llama()).unpad(rows)
    assert packed.inputs["input_ids"].tolist() == [
        rows["input_ids"][rows["attention_mask"].bool()].tolist()
    ]
    assert packed.inputs["position_ids"].tolist() == [[*range(7), 0, *range(12), *range(4)]]
    assert packed.inputs["cu_seq_lens_q"].tolist() == [0, 7, 8, 20, 24]
    assert packed.inputs["max_length_q"] == 12
    assert packed.targets.shape == (1, 24)


def test_no_row_predicts_the_first_token_of_the_next():
    """With every token supervised, the last token of a row still predicts nothing."""
    rows = batch()
    rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    targets = PaddingFree.of(tiny_llama()).unpad(rows).targets[0]
    assert [index for index, target in enumerate(targets.tolist()) if target == -100] == [
        6,
        7,
        19,
        23,
    ]


def test_a_row_alone_is_not_changed_by_its_neighbors():
    model = tiny_llama()
    padding_free, rows = PaddingFree.of(model), batch()
    before = logprobs(model, rows, padding_free)[2]
    rows["input_ids"][[0, 1, 3]] = 17
    torch.testing.assert_close(logprobs(model, rows, padding_free)[2], before)


def test_generation_and_padded_batches_stay_as_they_were():
    model, rows = tiny_llama(), batch()
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    before = model(**inputs).logits
    assert PaddingFree.of(model) is not None
    assert torch.equal(model(**inputs).logits, before)
    torch.testing.assert_close(
        model.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4)
    )


@pytest.mark.parametrize("family", sorted(BY_TYPE))
def test_every_family_is_packed_exactly_or_not_at_all(family):
    """The probe decides: ALiBi (BLOOM), learned positions (OPT), an attention of its own (Falcon)
    need padded rows."""
    # Rows beyond a window stay padded.
    windows = {
        name: 64
        for name in ("sliding_window", "attention_chunk_size", "index_topk")
        if BY_TYPE[family].config.get(name)
    }
    model = tiny_model(BY_TYPE[family], **windows).eval()
    padding_free = PaddingFree.of(model)
    packed_here = PACKED_TODAY if transformers_major() >= 5 else PACKED
    assert (padding_free is not None) == (family in packed_here)
    if padding_free is not None:
        rows = batch()
        torch.testing.assert_close(
            logprobs(model, rows, padding_free), logprobs(model, rows, None), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("share", [False, True])
def test_experts_that_report_their_balance(share, monkeypatch):
    """A checkpoint may ask for the router's loss, which reads the mask outside the layers."""
    monkeypatch.setattr(padding_free_module, "LEAST_PREFIX", 2)
    model = tiny_model(BY_TYPE["mixtral"], output_router_logits=True).eval()
    rows, padding_free = batch(), PaddingFree.of(model)
    rows["input_ids"][2, :4] = rows["input_ids"][3, :4]
    rows["labels"][3] = -100
    packed = padding_free.unpad(rows, share=share)
    head = Head.install(model)
    head.set_targets(packed.targets, places=packed.places)
    found = model(**packed.inputs, use_cache=False).logits
    head.remove()
    torch.testing.assert_close(
        scatter_token_logprobs(found, rows["labels"]), logprobs(model, rows, None)
    )


def test_eager_attention_is_left_padded():
    assert PaddingFree.of(tiny_llama(attn_implementation="eager")) is None


def test_rows_beyond_a_sliding_window_stay_padded():
    model = tiny_model(
        replace(BY_TYPE["mistral"], config=BY_TYPE["mistral"].config | {"sliding_window": 11})
    )
    padding_free = PaddingFree.of(model)
    assert padding_free.longest == 11 and padding_free.unpad(batch()) is None
    shorter = {key: value[:2] for key, value in batch().items()}
    assert padding_free.unpad(shorter) is not None


def test_lora_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    rows, padding_free = batch(), PaddingFree.of(model)
    assert padding_free is not None
    torch.testing.assert_close(
        logprobs(model, rows, padding_free), logprobs(model, rows, None), rtol=0, atol=1e-5
    )


def test_varlen_attention_by_hand():
    """One head of width 1, rows of 1 and 2 tokens, equal scores: the mean of a row's values so
    far."""
    value = torch.tensor([2.0, 4.0, 8.0]).view(1, 1, 3, 1)
    query = key = torch.zeros_like(value)
    found = varlen_attention(query, key, value, [1, 2], dropout=0.0, scale=1.0)
    assert found.shape == (1, 3, 1, 1) and found.flatten().tolist() == [2.0, 4.0, 6.0]


def kernel_of_today(
    query, key, value, ends, _, longest, longest_key, *, scale, window_size, enable_gqa=False
):
    """PyTorch's function for GPUs, computed row by row: (T, heads, D) in half precision."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and enable_gqa
    assert window_size == (-1, 0) and longest == longest_key == int(ends.diff().max())
    as_batch = [x.transpose(0, 1)[None] for x in (query, key, value)]
    return varlen_attention(*as_batch, ends.diff().tolist(), 0.0, scale)[0]


def first_kernel(query, key, value, ends, _, longest, longest_key, is_causal=False):
    """As of the release that brought it: no scale, equally many heads of keys."""
    assert is_causal and query.shape == key.shape
    as_batch = [x.transpose(0, 1)[None] for x in (query, key, value)]
    return varlen_attention(*as_batch, ends.diff().tolist(), 0.0, query.shape[-1] ** -0.5)[0]


@pytest.fixture(params=[kernel_of_today, first_kernel])
def kernels(request, monkeypatch):
    """As on a GPU, whose kernels each release calls in its own way."""
    parameters = frozenset(inspect.signature(request.param).parameters)
    monkeypatch.setattr(flash_varlen, "_kernel", lambda: (request.param, parameters))
    monkeypatch.setattr(sdpa, "_on_gpu", lambda query: True)


def test_kernels_of_a_gpu_get_rows_heads_and_scale(kernels):
    query, key, value = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    query, key, value = (x.bfloat16() for x in (query, key, value))
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    found = flash_varlen.flash_varlen(query, key, value, ends, 4, scale=0.7)
    expected = varlen_attention(query, key, value, [3, 4], 0.0, 0.7)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_model_under_autocast_runs_the_kernels_of_a_gpu(kernels):
    rows = batch()
    with torch.autocast("cpu", torch.bfloat16):
        padding_free = PaddingFree.of(model := tiny_llama())
        assert padding_free is not None
        found = logprobs(model, rows, padding_free)
    torch.testing.assert_close(found, logprobs(model, rows, None), atol=5e-2, rtol=5e-2)


def test_what_the_kernels_of_a_gpu_cannot_run_is_padded(kernels, monkeypatch, capsys):
    forget_warnings()
    monkeypatch.setattr(padding_free_module, "_can_lack_kernels", lambda model: True)
    assert PaddingFree.of(tiny_llama()) is None
    said = capsys.readouterr()
    assert "batches are padded: varlen attention cannot run here (the varlen kernels have no " in (
        said.out + said.err
    )


@pytest.mark.parametrize(
    ("attention", "device", "runs"),
    [
        ("sdpa", "cpu", True),
        ("eager", "cpu", False),
        ("flash_attention_2", "cpu", False),
        ("flash_attention_2", "cuda", True),
        ("sdpa", "cuda", flash_varlen.has_kernels()),
        (None, "cuda", False),
    ],
)
def test_where_there_is_varlen_attention(attention, device, runs):
    assert runs_varlen(attention, device) == runs


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for made in found if isinstance(found, tuple | list) else [found]:
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return found


@pytest.mark.skipif(transformers_major() < 5, reason="its models make no such mask")
@pytest.mark.parametrize("share", [False, True])
def test_nothing_of_all_tokens_by_all_tokens_is_made(share):
    model = tiny_llama()
    rows = torch.arange(40).repeat(60, 1)
    rows[:, 28:] = 100 + torch.arange(720).view(60, 12) % 277
    inputs = (
        PaddingFree.of(model)
        .unpad({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, share=share)
        .inputs
    )
    tokens = inputs["input_ids"].numel()
    assert tokens == (28 + 60 * 12 if share else 60 * 40)
    with torch.no_grad(), Largest() as largest:
        model.model(**inputs, use_cache=False)
    assert largest.elements < tokens**2
