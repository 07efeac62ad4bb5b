"""The peak of a training process: its parts by hand, what must make it grow or shrink, and one that
is measured."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from coati.parallel.footprint.layer_activations import saved_bytes
from coati.parallel.footprint.model_shape import ModelShape, load_shape
from coati.parallel.footprint.training_memory import HEAD_CHUNK, estimate
from coati.parallel.footprint.training_plan import TrainingPlan
from coati.parallel.options import ParallelOptions
from tests.parallel.footprint import measured_step

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
SHAPE = ModelShape.of(LLAMA)
N = SHAPE.parameters()
EMBEDDING = 1000 * 64
BF16 = ParallelOptions(precision="bf16")
FP32 = ParallelOptions(plugin="ddp")
LORA = {"lora_rank": 8}


def plan(options: ParallelOptions = FP32, **changes) -> TrainingPlan:
    return replace(TrainingPlan(options=options, batch_size=4, length=128), **changes)


def at(moment: str, options: ParallelOptions = FP32, **changes) -> dict[str, float]:
    return estimate(SHAPE, plan(options, **changes)).moments[moment]


def peak(options: ParallelOptions = BF16, shape: ModelShape = SHAPE, **changes) -> float:
    return estimate(shape, plan(options, **changes)).peak


# By hand


def test_weights_and_states_of_each_plugin():
    step = "optimizer step"
    ddp = at(step)
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (4 * N, 4 * N, 8 * N)
    zero = at(step, BF16, processes=4)
    assert (zero["weights"], zero["optimizer"]) == (2 * N, 12 * N / 4)
    # LowLevelZero keeps whole gradients, copies its share to fp32, and the largest to fp64.
    assert zero["gradients"] == 2 * N
    assert zero["working memory"] == 4 * N / 4 + 8 * EMBEDDING / 4
    # fp32 runs have master weights too, but nothing to copy gradients to.
    assert at(step, replace(BF16, precision="fp32"))["working memory"] == 8 * EMBEDDING
    gemini = at(step, replace(BF16, plugin="gemini"), processes=2)
    half = -(-N // 2)
    assert (gemini["weights"], gemini["optimizer"]) == (2 * half, 12 * half)
    assert gemini["gradients"] == 0  # written over the gathered weights
    assert gemini["working memory"] == 16 * EMBEDDING  # the first process has all of it


def test_ddp_has_buckets_where_they_are_touched():
    assert "gradient buckets" not in at("optimizer step")
    assert at("optimizer step", processes=2)["gradient buckets"] == 4 * N
    assert at("optimizer step", on_gpu=True)["gradient buckets"] == 4 * N


def test_the_host_holds_what_is_offloaded():
    offloaded = plan(replace(BF16, plugin="zero2_cpu"), processes=2, on_gpu=True)
    there = estimate(SHAPE, offloaded)
    assert there.host == 12 * N / 2 and "optimizer" not in there.parts
    assert estimate(SHAPE, replace(offloaded, on_gpu=False)).moments["optimizer step"]["optimizer"]


def test_what_layers_keep_and_what_is_computed_again():
    tokens = 4 * 128
    run = plan().layer_run()
    layer = tokens * sum(saved_bytes(SHAPE, run, 128).values())
    states = tokens * 2 * 4 * 64  # embedding and final norm
    assert at("backward of the head")["activations"] == 3 * layer + states
    again = replace(FP32, grad_checkpoint=True)
    kept = 3 * tokens * 4 * 64 + states  # the inputs of the layers
    assert at("backward of the head", again)["activations"] == kept
    assert at("backward of the last layer", again)["activations"] == kept + layer


def test_the_head_forms_a_chunk_of_logits():
    head = at("backward of the head")
    assert head["logits"] == 4 * 512 * 1000 and head["gradients"] == 4 * EMBEDDING
    assert head["head states"] == 2 * 4 * 512 * 64
    # 16 bits: logits, their copy in fp32, and their gradient; of half of the tokens
    assert at("backward of the head", BF16, supervised=0.5)["logits"] == 8 * 256 * 1000
    wide = replace(SHAPE, vocabulary=200_000)
    many = estimate(wide, plan(batch_size=64)).moments["backward of the head"]
    assert many["logits"] == pytest.approx(HEAD_CHUNK)
    capped = estimate(replace(SHAPE, caps_logits=True), plan()).moments["backward of the head"]
    assert capped["logits"] == 5 * 4 * 512 * 1000


def test_each_method_holds_its_models():
    half = {"options": BF16, "on_gpu": True}
    dpo = estimate(SHAPE, plan(**half, method="dpo", reference=True))
    assert dpo.parts["reference"] == 2 * N
    # Pairs are two rows.
    pairs = estimate(SHAPE, plan(**half, method="dpo", batch_size=2)).moments
    assert pairs == estimate(SHAPE, plan(**half, batch_size=4)).moments
    reward = estimate(SHAPE, plan(**half, method="rm")).parts
    assert reward["weights"] == 2 * (SHAPE.backbone_parameters() + 64) and "logits" not in reward
    rollouts = {"rollout_rows": 8, "forward_rows": 4, "reference": True, "reward_model": True}
    ppo = estimate(SHAPE, plan(**half, method="ppo", **rollouts))
    critic = SHAPE.backbone_parameters() + 64
    assert ppo.parts["weights"] == 2 * (N + critic)
    assert ppo.parts["optimizer"] == 12 * (N + critic)
    assert ppo.parts["reward model"] == 2 * critic
    cache = 2 * 2 * 32 * 3 * 8 * (128 + 256)  # K and V, 2 bytes, kv width, layers, rows, columns
    assert ppo.moments["rollout"]["key-value cache"] == cache
    offloaded = estimate(SHAPE, plan(**half, method="ppo", **rollouts, offload_inference=True))
    assert offloaded.parts["frozen model in use"] == 2 * critic  # one at a time


def test_states_of_each_optimizer():
    """The tied embedding apart from the rest; fp32 master weights under zero2 besides."""
    rest = N - EMBEDDING
    expected = {
        "adamw": 8 * N,
        "adamw8bit": (2 + 8 / 256) * rest + 8 * EMBEDDING,
        "adafactor": 0,
        "muon": 4 * rest + 8 * EMBEDDING,
        "lion": 4 * N,
    }
    for name, size in expected.items():
        assert at("optimizer step", optim=name)["optimizer"] == size, name
    half = at("optimizer step", BF16, optim="lion", processes=2)
    assert half["optimizer"] == (4 + 4) * N / 2
    adapters = SHAPE.adapter_parameters(8)
    assert at("optimizer step", optim="muon", **LORA)["optimizer"] == 4 * adapters
    untied = replace(SHAPE, tied=False)
    states = estimate(untied, plan(optim="muon")).moments["optimizer step"]["optimizer"]
    assert states == 4 * rest + 2 * 8 * EMBEDDING
    # What a step makes: of the largest hidden matrix, or of any; on a GPU kernels work in place.
    assert at("optimizer step", optim="muon")["working memory"] == 12 * 64 * 128
    assert at("optimizer step", optim="lion")["working memory"] == 12 * EMBEDDING
    assert at("optimizer step", optim="lion", on_gpu=True)["working memory"] == 0


def test_inputs_of_layers_in_host_memory():
    """All but two of them, of a model of 3 layers; nothing on a CPU, or without recomputation."""
    again = replace(BF16, grad_checkpoint=True)
    away = replace(again, offload_activations=True)
    kept = estimate(SHAPE, plan(again, on_gpu=True))
    moved = estimate(SHAPE, plan(away, on_gpu=True))
    layer = 4 * 128 * 2 * 64
    name = "backward of the head"
    difference = kept.moments[name]["activations"] - moved.moments[name]["activations"]
    assert difference == layer and (kept.host, moved.host) == (0, layer)
    deep = replace(SHAPE, layers=20)
    assert estimate(deep, plan(away, on_gpu=True)).host == 18 * layer
    assert estimate(SHAPE, plan(away)) == estimate(SHAPE, plan(again))


# What must grow or shrink


@pytest.mark.parametrize(
    "options", [FP32, BF16, replace(BF16, plugin="gemini"), replace(BF16, grad_checkpoint=True)]
)
def test_more_tokens_take_more(options):
    sizes = [peak(options, batch_size=rows, length=512) for rows in (8, 16, 32)]
    assert sizes == sorted(set(sizes))
    # Without scores only the tokens count.
    assert peak(options, batch_size=8, length=1024) == peak(options, batch_size=16, length=512)
    eager = replace(SHAPE, caps_scores=True)
    assert peak(options, eager, batch_size=8, length=1024) > peak(
        options, eager, batch_size=16, length=512
    )


@pytest.mark.parametrize("model", ["SmolLM2-135M", "Qwen3-8B", "gemma-3-4b-it", "gpt-oss-20b"])
def test_what_saves_memory_saves_it(model):
    shape = load_shape(model)
    big = {"shape": shape, "batch_size": 8, "length": 2048, "on_gpu": True}
    whole = peak(**big)
    again = replace(BF16, grad_checkpoint=True)
    assert peak(again, **big) < whole
    assert peak(**big, **LORA) < whole
    assert peak(again, **big, **LORA) < peak(again, **big)
    assert peak(replace(BF16, plugin="zero2_cpu"), **big) < whole
    assert whole < peak(replace(BF16, plugin="ddp"), **big)  # fp32 weights
    ranks = [peak(**big, processes=count) for count in (1, 2, 4, 8)]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) == 4
    gemini = [peak(replace(BF16, plugin="gemini"), **big, processes=n) for n in (2, 4, 8)]
    assert gemini == sorted(gemini, reverse=True) and gemini[2] < ranks[3]
    split = replace(BF16, plugin="3d", tp=2)
    assert peak(split, **big, processes=2) < whole


def test_a_host_holds_weights_twice_while_they_are_read_and_written():
    few = {"batch_size": 1, "length": 16, **LORA}
    host = estimate(SHAPE, plan(FP32, **few))
    adapters = SHAPE.adapter_parameters(8)
    assert host.moment == "saving"
    assert host.peak == 2 * 4 * (N + adapters) + 8 * adapters
    assert not {"loading", "saving"} & set(estimate(SHAPE, plan(FP32, **few, on_gpu=True)).moments)


def test_accumulated_gradients_are_there_before_the_next_backward():
    moments = [
        estimate(SHAPE, plan(replace(FP32, accumulation_steps=count))).moments for count in (1, 2)
    ]
    head = "backward of the head"
    assert moments[1][head]["gradients"] - moments[0][head]["gradients"] == 4 * N
    assert moments[0]["optimizer step"] == moments[1]["optimizer step"]


def test_a_budget_of_tokens_stands_for_a_number_of_rows():
    """Rows of 128: 300 tokens are 2 of them, 100 are the one that must be; of pairs 2 rows; a step
    has no more than it has."""
    budget = replace(FP32, accumulation_steps=2)

    def same(tokens: int, rows: int, **changes) -> bool:
        cut = plan(replace(budget, tokens_per_batch=tokens), **changes)
        size = rows // 2 if changes else rows
        expected = estimate(SHAPE, plan(budget, **changes | {"batch_size": size})).moments
        return cut.rows == rows and estimate(SHAPE, cut).moments == expected

    assert same(300, 2) and same(100, 1) and same(127 * 8, 7) and same(10**6, 8)
    assert same(300, 2, method="dpo") and same(700, 4, method="dpo")
    alone = plan(replace(FP32, tokens_per_batch=300)).options
    assert alone.accumulates and not FP32.accumulates


# Beside a real step

MEASURED = LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "vocab_size": 8000,
    "pad_token_id": 2,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_estimate_is_what_the_allocator_holds(grad_checkpoint):
    """Plugin ddp, of one process: what others send is freed by gloo's threads, unseen by the
    profiler."""
    options = replace(FP32, grad_checkpoint=grad_checkpoint)
    asked = {"config": MEASURED, "rows": 4, "length": 256, "options": vars(options)}
    run = subprocess.run(
        [sys.executable, measured_step.__file__, json.dumps(asked)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    guess = estimate(ModelShape.of(MEASURED), plan(options, length=256)).peak
    assert guess == pytest.approx(json.loads(run.stdout.splitlines()[-1]), rel=0.1)
