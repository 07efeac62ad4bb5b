"""What a run's flags say of its memory."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coati.cli.arguments import parse_sft
from coati.cli.distilling import parse_gkd
from coati.cli.offline_rl import parse_ilql
from coati.cli.preferences import parse_dpo, parse_kto, parse_orpo, parse_rm
from coati.cli.rollouts import parse_grpo, parse_ppo
from coati.parallel.footprint.model_shape import ModelShape
from coati.parallel.footprint.training_memory import estimate
from coati.parallel.footprint.training_plan import TrainingPlan
from coati.parallel.options import ParallelOptions
from coati.recipes.memory_plan import measured_memory, memory_lines, plan_of
from tests.tiny import tiny_llama

ROWS = Path(__file__).parents[2] / "examples" / "data" / "sft.jsonl"  # nothing reads them here
DATA = ["--pretrain", "M", "--dataset", str(ROWS), "--save_dir", "S", "--max_length", "256"]
REWARD = ["--reward_functions", "length", "--max_seq_len", "60"]


def planned(parse, *flags: str, longest: int = 100, **options) -> TrainingPlan:
    settings = parse([*DATA, *flags])
    asked = ParallelOptions(**options)
    return plan_of(settings, asked, processes=2, on_gpu=False, longest=longest)


def test_batches_and_lengths_are_the_flags():
    plan = planned(parse_sft, "--batch_size", "3")
    assert (plan.method, plan.batch_size, plan.length, plan.processes) == ("sft", 3, 100, 2)
    assert planned(parse_sft, longest=1000).length == 256
    assert planned(parse_sft, "--packing").length == 256  # packs are full
    assert not plan.reference and plan.rollout_rows == 0


def test_adapters_and_their_dropout():
    plan = planned(parse_sft, "--lora_rank", "16", lora=True)
    assert (plan.lora_rank, plan.lora_targets, plan.lora_dropout) == (16, None, True)
    assert not planned(parse_dpo, "--lora_rank", "16", lora=True).lora_dropout
    shared = planned(parse_sft, "--lora_config", "config/lora_config.json", lora=True)
    assert shared.lora_rank == 32 and "q_proj" in shared.lora_targets


@pytest.mark.parametrize(
    ("parse", "flags", "held"),
    [
        (parse_dpo, (), True),
        (parse_dpo, ("--precompute_ref",), False),
        (parse_dpo, ("--disable_reference_model",), False),
        (parse_dpo, ("--loss_type", "simpo_loss"), False),
        (parse_kto, (), True),
        (parse_ilql, (), False),
        (parse_orpo, (), False),
        (parse_rm, (), False),
        (parse_grpo, REWARD, True),
        (parse_grpo, (*REWARD, "--kl_coef", "0"), False),
    ],
)
def test_which_runs_hold_a_reference(parse, flags, held):
    assert planned(parse, *flags).reference == held
    with_adapters = planned(parse, *flags, "--lora_rank", "8", lora=True)
    assert not with_adapters.reference


def test_rollouts_are_of_prompts_and_responses():
    flags = [*REWARD, "--experience_batch_size", "4"]
    flags += ["--num_generations", "8", "--train_batch_size", "2"]
    plan = planned(parse_grpo, *flags)
    assert (plan.length, plan.supervised) == (160, 60 / 160)
    assert (plan.rollout_rows, plan.batch_size, plan.forward_rows) == (32, 2, 2)
    assert planned(parse_grpo, *flags, "--inference_batch_size", "5").rollout_rows == 5
    ppo = planned(parse_ppo, "--rm_pretrain", str(ROWS.parent), "--max_seq_len", "60")
    assert ppo.method == "ppo" and ppo.reward_model
    assert not planned(parse_ppo, *REWARD).reward_model
    mixed = planned(parse_ppo, *REWARD, "--ptx_dataset", str(ROWS), "--ptx_coef", "0.1")
    assert mixed.options.accumulation_steps > 1


def test_a_teacher_and_the_responses_of_its_student(tmp_path):
    tiny_llama(hidden=96).save_pretrained(tmp_path)
    flags = ["--teacher", str(tmp_path), "--batch_size", "4", "--accumulation_steps", "2"]
    plan = planned(parse_gkd, *flags)
    assert (plan.method, plan.teacher.hidden, plan.rollout_rows) == ("gkd", 96, 4)
    assert planned(parse_gkd, *flags, "--gkd_lambda", "1").rollout_rows == 8
    assert planned(parse_gkd, *flags, "--inference_batch_size", "3").rollout_rows == 3
    assert planned(parse_gkd, *flags, "--gkd_lambda", "0").rollout_rows == 0
    for adapter, base in (("first", tmp_path), ("second", tmp_path / "first")):
        (tmp_path / adapter).mkdir()
        settings = {"base_model_name_or_path": str(base)}
        (tmp_path / adapter / "adapter_config.json").write_text(json.dumps(settings))
        (tmp_path / adapter / "adapter_model.safetensors").touch()
    adapted = planned(parse_gkd, "--teacher", str(tmp_path / "second"))
    assert adapted.teacher == plan.teacher
    served = planned(parse_gkd, "--teacher_url", "http://host:1")
    assert served.teacher is None and served.rollout_rows


def test_a_teacher_takes_its_weights_and_its_states(tmp_path):
    """fp32 weights of the teacher, whole under gemini too, and hidden states of every token."""
    shape = ModelShape.of(tiny_llama(hidden=96).config.to_dict())
    student = ModelShape.of(tiny_llama().config.to_dict())
    for options in ({"plugin": "ddp", "precision": "fp32"}, {"plugin": "gemini"}):
        alone = TrainingPlan("gkd", ParallelOptions(**{"precision": "bf16"} | options), 2)
        taught = estimate(student, replace(alone, teacher=shape))
        width = 4 if options["plugin"] == "ddp" else 2
        assert taught.moments["optimizer step"]["teacher"] == width * shape.parameters()
        states = taught.moments["backward of the head"]["teacher's states"]
        assert states == 4 * alone.tokens * 96
        forward = taught.moments["teacher's forward"]
        few = replace(alone, lora_rank=8, quantize_base="int8", dora=True, teacher=shape)
        below = estimate(student, few).moments["teacher's forward"]
        assert below["working memory"] == forward["working memory"]  # a teacher is not quantized


def run_of(settings) -> SimpleNamespace:
    return SimpleNamespace(settings=settings, options=ParallelOptions(plugin="ddp"))


def engine_of(config: dict) -> SimpleNamespace:
    module = nn.Linear(4, 4)
    module.config = SimpleNamespace(to_dict=lambda: config)
    mesh = SimpleNamespace(dp_size=1, sharded_forward=False)
    device = torch.device("cpu")
    options = ParallelOptions(plugin="ddp")
    return SimpleNamespace(module=module, mesh=mesh, device=device, options=options)


def test_a_model_without_a_formula_is_told_what_can_be_counted():
    engine = engine_of({"model_type": "mamba2"})
    held, why = memory_lines(run_of(parse_sft(DATA)), {"actor": engine}, 10)
    assert (
        "before activations: weights 0.0 MiB" in held and "(20 parameters held, 20 trained)" in held
    )
    assert why.startswith("activations come on top: there is no formula for model family")


def test_the_parts_stand_from_the_largest_down():
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    }
    (line,) = memory_lines(run_of(parse_sft(DATA)), {"actor": engine_of(config)}, 100)
    # 3,408,128 weights: two moments of 4 bytes, then the weights
    assert "optimizer 26.0 MiB" in line and "weights 13.0 MiB" in line
    assert line.index("optimizer") < line.index("weights") < line.index("(at its peak, ")


def test_the_libraries_are_not_the_run():
    run = SimpleNamespace(resident_before=700.0)
    line = measured_memory(run, [900.0, 1000.0])
    assert "measured: 300.0 MiB at its peak, besides 700.0 MiB of libraries" in line
