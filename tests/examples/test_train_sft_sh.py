"""The shell wrappers, run with stand-ins for the launcher and for nvidia-smi that record what they
were called with."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.flat import (
    parse_dpo,
    parse_gkd,
    parse_grpo,
    parse_kto,
    parse_online_dpo,
    parse_orpo,
    parse_ppo,
    parse_pretrain,
    parse_rm,
    parse_sft,
)

SCRIPTS = Path(__file__).parent.parent.parent / "examples" / "training_scripts"
# Four GPUs; numbers 3 and 1 have the least memory in use.
NVIDIA_SMI = """#!/bin/sh
case "$1" in
--list-gpus) printf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n' ;;
*) printf '0, 9000\\n1, 20\\n2, 300\\n3, 4\\n' ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A bare machine: system tools, plus the programs named; returns a function that runs
    train_sft.sh on it."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def install(name, text):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(
        *words, launcher=("colossalai", "torchrun"), gpus=False, script="train_sft.sh", **variables
    ):
        for name in launcher:
            install(
                name,
                '#!/bin/sh\nprintf \'%s\\n\' "CUDA=$CUDA_VISIBLE_DEVICES" "$@" '
                f"> {tmp_path}/called\n",
            )
        if gpus:
            install("nvidia-smi", NVIDIA_SMI)
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), **variables}
        done = subprocess.run(
            ["bash", str(SCRIPTS / script), *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=60,
        )
        called = tmp_path / "called"
        return done, called.read_text().splitlines() if called.exists() else None

    return run


@pytest.mark.parametrize("script", sorted(SCRIPTS.parent.rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_without_gpus_one_process_trains_with_flags_that_the_parser_accepts(machine, tmp_path):
    for part in ("part-00000", "part-00001"):
        (tmp_path / "arrow" / part).mkdir(parents=True)
    dataset = f"{tmp_path}/arrow/part-*"
    done, called = machine(
        "--max_steps", "3", "--lr", "1e-4", PRETRAINED_MODEL_PATH="m", DATASET=dataset
    )
    assert done.returncode == 0, done.stderr
    assert called[:6] == ["CUDA=", "run", "--nproc_per_node", "1", "--master_port", "29500"]
    assert called[6].endswith("train_sft.py")
    args = parse_sft(called[7:])
    assert args.dataset == [f"{tmp_path}/arrow/part-00000", f"{tmp_path}/arrow/part-00001"]
    assert (args.max_steps, args.lr, args.tokenizer_dir, args.plugin) == (3, 1e-4, "m", "zero2")
    assert args.save_dir.startswith("output/sft-20")


# The published hyper-parameters of each stage.
STAGES = {
    "pt": (parse_pretrain, {"batch_size": 4, "accumulation_steps": 8, "lr": 3e-5, "packing": True}),
    "rm": (
        parse_rm,
        {"batch_size": 8, "lr": 5e-6, "max_epochs": 3, "weight_decay": 0.01, "warmup_steps": 40},
    ),
    "dpo": (
        parse_dpo,
        {"batch_size": 16, "accumulation_steps": 2, "lr": 1e-6, "beta": 0.1, "max_length": 4096},
    ),
    "orpo": (
        parse_orpo,
        {"batch_size": 16, "lr": 8e-6, "lam": 0.5, "max_length": 1024, "max_epochs": 3},
    ),
    "gkd": (parse_gkd, {"batch_size": 8, "lr": 1e-5, "teacher": "t", "max_length": 2048}),
    "kto": (parse_kto, {"batch_size": 8, "lr": 1e-5, "auto_weight": True, "max_length": 1024}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_other_stages_start_with_flags_that_their_parsers_accept(machine, tmp_path, stage):
    parse, published = STAGES[stage]
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
    data = {"DATASET": str(tmp_path / "train"), "EVAL_DATASET": str(tmp_path / "held")}
    data |= {"TEACHER": "t"} if stage == "gkd" else {}
    done, called = machine(
        "--max_steps", "3", script=f"train_{stage}.sh", PRETRAINED_MODEL_PATH="m", **data
    )
    assert done.returncode == 0, done.stderr
    assert called[6].endswith(f"train_{stage}.py")
    args = parse(called[7:])
    assert {name: getattr(args, name) for name in published} == published
    assert args.eval_dataset == [data["EVAL_DATASET"]] and args.save_dir.startswith(
        f"output/{stage}-20"
    )


# The published hyper-parameters of the stages with rollouts; the parsers check the buffer equation.
ROLLOUTS = {
    "ppo": (
        parse_ppo,
        {
            "num_episodes": 2000,
            "num_update_steps": 1,
            "train_batch_size": 4,
            "accumulation_steps": 2,
            "lr": 9e-6,
            "grad_clip": 0.1,
            "warmup_steps": 40,
            "plugin": "zero2",
        },
    ),
    "grpo": (
        parse_grpo,
        {
            "num_episodes": 100,
            "num_generations": 8,
            "kl_coef": 0.01,
            "max_length": 2000,
            "max_seq_len": 1700,
            "inference_batch_size": 8,
            "logits_forward_batch_size": 2,
        },
    ),
    "online_dpo": (
        parse_online_dpo,
        {
            "num_episodes": 100,
            "num_generations": 2,
            "train_batch_size": 4,
            "beta": [0.1],
            "lr": 5e-7,
            "missing_eos_penalty": 1.0,
            "plugin": "zero2",
        },
    ),
}


@pytest.mark.parametrize("stage", ROLLOUTS)
def test_rollouts_start_with_flags_that_their_parsers_accept(machine, tmp_path, stage):
    parse, published = ROLLOUTS[stage]
    (tmp_path / "prompts").mkdir()
    variables = {
        "PRETRAINED_MODEL_PATH": "m",
        "REWARD_MODEL_PATH": "r",
        "REWARD_FUNCTIONS": "length format",
    }
    done, called = machine(
        script=f"train_{stage}.sh", PROMPT_DATASET=str(tmp_path / "prompts"), **variables
    )
    assert done.returncode == 0, done.stderr
    args = parse(called[7:])
    assert {name: getattr(args, name) for name in published} == published
    assert (
        args.prompt_dataset == [str(tmp_path / "prompts")]
        and args.rm_pretrain == "r"
        and args.ptx_coef == 0
    )
    assert args.reward_functions == ["length", "format"] and args.save_dir.startswith(
        f"output/{stage}-20"
    )


def test_ptx_data_bring_their_coefficient(machine, tmp_path):
    for name in ("prompts", "chats"):
        (tmp_path / name).mkdir()
    data = {"DATASET": str(tmp_path / "prompts"), "PTX_DATASET": str(tmp_path / "chats")}
    done, called = machine(
        script="train_ppo.sh", PRETRAINED_MODEL_PATH="m", REWARD_MODEL_PATH="r", **data
    )
    args = parse_ppo(called[7:])
    assert (args.ptx_dataset, args.ptx_coef, args.ptx_batch_size) == (
        [data["PTX_DATASET"]],
        0.1,
        1,
    ), done.stderr


def test_rollouts_ask_for_prompts(machine):
    done, called = machine(script="train_ppo.sh", PRETRAINED_MODEL_PATH="m")
    assert done.returncode != 0 and "PROMPT_DATASET" in done.stderr and called is None


@pytest.mark.parametrize("processes, chosen", [("2", "CUDA=3,1"), (None, "CUDA=3,1,2,0")])
def test_the_least_used_gpus_are_chosen(machine, processes, chosen):
    variables = {"NPROC_PER_NODE": processes} if processes else {}
    done, called = machine(gpus=True, PRETRAINED_MODEL_PATH="m", DATASET="d", **variables)
    assert called[0] == chosen and called[3] == (processes or "4"), done.stderr


def test_a_choice_already_made_is_respected(machine):
    _, called = machine(
        gpus=True, CUDA_VISIBLE_DEVICES="2,0", PRETRAINED_MODEL_PATH="m", DATASET="d"
    )
    assert called[0] == "CUDA=2,0" and called[3] == "2"


def test_more_processes_than_gpus_are_refused(machine):
    done, called = machine(gpus=True, NPROC_PER_NODE="8", PRETRAINED_MODEL_PATH="m", DATASET="d")
    assert done.returncode != 0 and called is None and "8 GPUs wanted" in done.stderr


def test_hosts_and_settings_come_from_the_environment(machine):
    _, called = machine(
        PRETRAINED_MODEL_PATH="m",
        DATASET="a b",
        HOSTFILE="hosts",
        MASTER_PORT="1234",
        SAVE_DIR="s",
        BATCH_SIZE="2",
    )
    text = " ".join(called)
    assert "--master_port 1234 --hostfile hosts" in text and "--dataset a b " in text
    assert "--save_dir s" in text and "--batch_size 2" in text


@pytest.mark.parametrize("missing", ["PRETRAINED_MODEL_PATH", "DATASET"])
def test_what_has_no_default_is_asked_for(machine, missing):
    given = {"PRETRAINED_MODEL_PATH": "m", "DATASET": "d"}
    del given[missing]
    done, called = machine(**given)
    assert done.returncode != 0 and missing in done.stderr and called is None


@pytest.mark.skipif(os.path.exists("/usr/bin/torchrun"), reason="the system itself has a torchrun")
def test_a_missing_torchrun_says_what_to_do(machine):
    done, called = machine(launcher=("colossalai",), PRETRAINED_MODEL_PATH="m", DATASET="d")
    assert done.returncode == 127 and called is None
    assert "torchrun is not on PATH" in done.stderr and ".venv/bin" in done.stderr
