import json
import resource
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from coati.cli.arguments import sft_parser
from coati.cli.rollouts import parse_ppo
from coati.cli.settings import SFTSettings
from coati.utils import packages
from coati.utils.json_io import save_json
from tests.cli.documented import documented_commands
from tests.cli.flat import parse_sft

ROOT = Path(__file__).parent.parent.parent
LOADED = (
    "import sys; print([m for m in ('torch', 'transformers', 'colossalai') if m in sys.modules])"
)

# The flags of the reference's train_sft.py and their defaults, minus the two that follow the
# machine here.
REFERENCE = {
    "--grad_clip": 1.0,
    "--weight_decay": 0.1,
    "--warmup_steps": None,
    "--tp": 1,
    "--pp": 1,
    "--sp": 1,
    "--disable_loss_mask": False,
    "--enable_sequence_parallelism": False,
    "--zero_stage": 0,
    "--zero_cpu_offload": False,
    "--sp_mode": "split_gather",
    "--pretrain": None,
    "--tokenizer_dir": None,
    "--dataset": [],
    "--eval_dataset": [],
    "--checkpoint_path": None,
    "--max_epochs": 3,
    "--batch_size": 4,
    "--max_len": 512,
    "--lora_config": None,
    "--save_interval": 1000,
    "--lr": 5e-6,
    "--config_file": None,
    "--accumulation_steps": 8,
    "--log_dir": None,
    "--use_wandb": False,
    "--grad_checkpoint": False,
    "--use_flash_attn": False,
    "--microbatch_size": 1,
    "--plugin": None,
    "--mixed_precision": None,
}
QLORA = ["--lora_rank", "4", "--quantize_base", "nf4"]


@pytest.fixture
def sft(data):
    """parse_sft with the required flags given."""
    return lambda words=(): parse_sft(["--pretrain", "m", "--dataset", data["dataset"], *words])


@pytest.mark.parametrize("flag", REFERENCE)
def test_every_flag_of_the_reference_is_there_with_its_default(flag):
    assert sft_parser().action_of(flag).default == REFERENCE[flag]


@pytest.mark.parametrize("command", documented_commands("sft"), ids=lambda command: command.source)
def test_documented_commands_parse(command, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(command.processes))
    words = command.words(data)
    script = next(position for position, word in enumerate(words) if word.endswith("train_sft.py"))
    args = parse_sft(words[script + 1 :])
    assert (
        args.pretrain == data["PRETRAINED_MODEL_PATH"]
        and args.save_dir == data["SAVE_DIR"]
        and args.lr == 2e-5
    )


def test_the_file_of_documented_commands_is_complete():
    stages = [command.stage for command in documented_commands()]
    count = {stage: stages.count(stage) for stage in ("sft", "ppo", "rm", "prompts")}
    assert count == {"sft": 14, "ppo": 2, "rm": 2, "prompts": 3}
    assert not any("#" in command.text for command in documented_commands())


@pytest.mark.parametrize(
    "words, value, said",
    [
        (["--strategy", "naive"], ("plugin", "ddp"), "--strategy naive is now --plugin ddp"),
        (
            ["--strategy", "colossalai_gemini"],
            ("plugin", "gemini"),
            "colossalai_gemini is now --plugin gemini",
        ),
        (
            ["--strategy", "colossalai_zero2_cpu"],
            ("plugin", "zero2_cpu"),
            "is now --plugin zero2_cpu",
        ),
        (
            ["--accimulation_steps", "3"],
            ("accumulation_steps", 3),
            "--accimulation_steps is now --accumulation_steps",
        ),
        (
            ["--max_datasets_size", "9"],
            ("max_samples", 9),
            "--max_datasets_size is now --max_samples",
        ),
        (["--tokenizer", "t"], ("tokenizer_dir", "t"), "--tokenizer is now --tokenizer_dir"),
        (
            ["--model", "llama"],
            ("pretrain", "m"),
            "--model llama has no effect: the architecture is read from",
        ),
        (["--need_optim_ckpt", "True"], ("pretrain", "m"), "--need_optim_ckpt True has no effect"),
        (
            ["--use_grad_checkpoint"],
            ("grad_checkpoint", True),
            "--use_grad_checkpoint is now --grad_checkpoint",
        ),
    ],
)
def test_older_flags_say_what_they_became(sft, capsys, words, value, said):
    args = sft(words)
    assert getattr(args, value[0]) == value[1]
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and said in lines[0]


def test_0_steps_between_evaluations_switch_them_off(sft, tmp_path):
    assert sft(["--eval_interval", "0", "--eval_dataset", str(tmp_path)]).eval_interval == 0


def test_older_flags_are_not_offered():
    text = sft_parser().format_help()
    assert "--strategy" not in text and "--accimulation_steps" not in text


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--strategy", "colossalai_zero3"],
            "argument --strategy: invalid choice: 'colossalai_zero3'",
        ),
        (["--plugin", "gemini", "--lora_rank", "8"], "--plugin gemini cannot train LoRA adapters"),
        (["--plugin", "gemini", "--mixed_precision", "fp32"], "--plugin gemini has no fp32"),
        (["--plugin", "gemini_auto"], "--plugin gemini_auto cannot accumulate gradients"),
        (["--plugin", "zero2", "--pp", "2"], "--pp 2 needs --plugin 3d"),
        (["--pp", "2", "--lora_rank", "8"], "--plugin 3d trains LoRA adapters only with"),
        (["--tp", "2"], "1 processes cannot be divided by --tp 2"),
        (["--sp", "2"], "--sp 2 needs --enable_sequence_parallelism"),
        (["--lora_alpha", "8"], "--lora_alpha does nothing without LoRA"),
        (["--merge_lora_weights"], "--merge_lora_weights does nothing without LoRA"),
        (["--use_dora"], "--use_dora does nothing without LoRA"),
        (["--lora_plus_ratio", "16"], "--lora_plus_ratio does nothing without LoRA"),
        (["--lora_target", "attention"], "--lora_target does nothing without LoRA"),
        (
            ["--quantize_base", "nf4"],
            "--quantize_base nf4 does nothing without LoRA: weights of few bits cannot be trained",
        ),
        (["--quantize_base", "int3"], "argument --quantize_base: invalid choice: 'int3'"),
        ([*QLORA, "--plugin", "gemini"], "--plugin gemini cannot train LoRA adapters"),
        ([*QLORA, "--tp", "2"], "--quantize_base nf4 with --tp 2: a quantized base cannot be"),
        ([*QLORA, "--pp", "2"], "--quantize_base nf4 with --pp 2: a quantized base cannot be"),
        (["--lora_rank", "4", "--use_dora", "--tp", "2"], "--use_dora with --tp 2: the norms"),
        (
            ["--lora_rank", "4", "--use_dora", "--lora_experts"],
            "--use_dora with --lora_experts: DoRA is for linear layers",
        ),
        (
            ["--lora_rank", "4", "--lora_target", "q_proj,v_proj"],
            "--lora_target q_proj,v_proj: No such file or directory; expected all-linear",
        ),
        (["--lora_rank", "4", "--lora_plus_ratio", "0"], "--lora_plus_ratio: expected a number"),
        (["--eval_interval", "8"], "--eval_interval does nothing without --eval_dataset"),
        (
            ["--checkpoint_weights_only"],
            "--checkpoint_weights_only does nothing without --checkpoint_path",
        ),
        (
            ["--checkpoint_path", "no/where"],
            "--checkpoint_path no/where: there is no such directory",
        ),
        (
            ["--eval_dataset", "no/where"],
            "--eval_dataset no/where: there is no such file or directory",
        ),
        (["--lora_config", "no/where"], "--lora_config no/where: No such file"),
        (
            ["--max_length", "1"],
            "argument --max_length/--max_len: expected a whole number of at least 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(sft, refused, words, said):
    assert said in refused(sft, words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no name; expected all-linear, attention or a file"),
        ("# none\n\n", "holds no name"),
        ("q_proj\nv_proj k_proj\n", "line 2: 'v_proj k_proj' is no name of a layer"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_bad_file_of_targets_is_named(sft, refused, tmp_path, text, said):
    file = tmp_path / "targets.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"targets.txt{',' if 'line 2' in said else ':'} {said}" in refused(
        sft, ["--lora_rank", "4", "--lora_target", str(file)]
    )


def test_the_file_of_lora_config_says_of_the_base_what_no_flag_says(sft, refused, tmp_path):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"r": 4, "use_dora": True, "quantize_base": "int8"}))
    args = sft(["--lora_config", str(file)])
    assert (args.use_dora, args.quantize_base, args.use_rslora) == (True, "int8", False)
    assert sft(["--lora_config", str(file), "--quantize_base", "nf4"]).quantize_base == "nf4"
    said = refused(sft, ["--lora_config", str(file), "--tp", "2"])
    assert "--quantize_base int8 with --tp 2" in said or "--plugin 3d trains LoRA" in said
    file.write_text(json.dumps({"r": 4, "lora_initialization_method": "PiSSA"}))
    said = refused(sft, ["--lora_config", str(file), "--quantize_base", "nf4"])
    assert "--quantize_base nf4: PiSSA" in said


def test_4_bits_without_bitsandbytes_are_refused_at_once(sft, refused, monkeypatch):
    found = packages._release
    monkeypatch.setattr(
        packages, "_release", lambda name: None if name == "bitsandbytes" else found(name)
    )
    said = refused(sft, QLORA)
    assert "--quantize_base nf4 needs the package bitsandbytes, which is not installed" in said
    assert sft([*QLORA, "--quantize_base", "int8"]).quantize_base == "int8"


@pytest.mark.parametrize("missing", ["--pretrain", "--dataset"])
def test_a_missing_flag_is_named(refused, data, missing):
    given = {"--pretrain": "m", "--dataset": data["dataset"]}
    del given[missing]
    assert f"{missing} is missing" in refused(
        parse_sft, [word for pair in given.items() for word in pair]
    )


@pytest.mark.parametrize(
    "text, words, rank", [({"r": 128}, [], 128), ({"r": 128}, ["--lora_rank", "0"], 0), ({}, [], 0)]
)
def test_the_rank_comes_from_the_flag_or_the_file(sft, tmp_path, text, words, rank):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps(text))
    assert sft(["--lora_config", str(file), *words]).lora_rank == rank


@pytest.mark.parametrize(
    "text, said", [("{", "lora.json:1:2: not valid JSON"), ("[1]", "expected a JSON object")]
)
def test_a_bad_json_file_is_named(sft, refused, tmp_path, text, said):
    file = tmp_path / "lora.json"
    file.write_text(text)
    assert said in refused(sft, ["--lora_config", str(file)])


@pytest.mark.parametrize(
    "name, said",
    [
        ("google/gemma-3-4b-it", None),
        ("gemma-3-4b", "--conversation_template_config gemma-3-4b: no such file"),
        ("own.json", "--conversation_template_config own.json: no such file"),
    ],
)
def test_a_template_that_comes_with_coati_is_named_or_refused(sft, refused, name, said):
    words = ["--conversation_template_config", name]
    if said is None:
        assert sft(words).conversation_template_config == name
    else:
        assert said in refused(sft, words)


@pytest.mark.parametrize("parse", [parse_sft, parse_ppo])
def test_training_without_colossalai_names_the_command(parse, refused, data, monkeypatch):
    """At once, while the flags are read: torch is imported later."""
    found = packages._release
    monkeypatch.setattr(
        packages, "_release", lambda name: None if name == "colossalai" else found(name)
    )
    words = ["--pretrain", "m", "--dataset", data["dataset"]]
    if parse is parse_ppo:
        words = ["--pretrain", "m", "--prompt_dataset", data["dataset"], "--rm_pretrain", "m"]
    said = refused(parse, words)
    assert said.endswith("run: pip install --no-deps colossalai==0.5.0\n")


def test_the_flags_that_a_run_recorded_can_be_read_back(sft, tmp_path):
    args = sft(
        [
            "--lora_rank",
            "8",
            "--seed",
            "3",
            "--use_wandb",
            "--weight_decay",
            "0",
            "--plugin",
            "zero2",
        ]
    )
    file = tmp_path / "arguments.json"
    save_json(vars(args), file)
    assert vars(parse_sft(["--config", str(file)])) == vars(args) | {"config": str(file)}


def fields_of(kind) -> set[str]:
    """The names of the fields of a settings class and of its groups."""
    names = set()
    for name, hint in get_type_hints(kind).items():
        names |= fields_of(hint) if is_dataclass(hint) else {name}
    return names


def test_every_flag_is_in_the_settings_and_read_somewhere():
    """A flag that nothing reads is a promise that nobody keeps."""
    flags = {action.dest for action in sft_parser().documented()} - {"help", "config"}
    renamed = {"mixed_precision": "precision"}  # in ParallelOptions
    fields = {renamed.get(flag, flag) for flag in flags}
    assert fields - fields_of(SFTSettings) == set()
    text = "".join(
        path.read_text()
        for package in ("recipes", "parallel", "trainer", "cli")
        for path in (ROOT / "coati" / package).rglob("*.py")
        if path.name != "checks.py"
    )
    assert {name for name in fields if f".{name}" not in text} == set()


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["--pretran", "x"], 2)])
def test_help_and_refusals_are_quick_and_load_no_torch(words, code):
    program = (
        f"from coati.cli.arguments import parse_sft\ntry: parse_sft({words!r})\nfinally: {LOADED}"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == code and run.stdout.endswith("[]\n")
    said = "Supervised fine-tuning" if code == 0 else "did you mean --pretrain"
    assert said in run.stdout + run.stderr
    # Processor time, so that a busy machine does not fail it.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lr_scheduler", "constant", "--lr_min_ratio", "0.5"], "--lr_min_ratio does nothing"),
        (["--decay_ratio", "0.5"], "--decay_ratio does nothing with --lr_scheduler cosine"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience does nothing without"),
        (["--early_stopping_threshold", "2"], "does nothing without --early_stopping_patience"),
        (["--eval_ratio", "0.6"], "--eval_ratio"),
        (["--eval_ratio", "0.1", "--eval_dataset", "ROWS"], "--eval_ratio takes evaluation rows"),
    ],
)
def test_flags_of_schedule_and_evaluation_that_would_do_nothing(tmp_path, capsys, words, said):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    given = [str(rows) if word == "ROWS" else word for word in words]
    with pytest.raises(SystemExit):
        parse_sft(["--pretrain", "a/b", "--dataset", str(rows), *given])
    assert said in capsys.readouterr().err


def test_rows_are_named_with_a_split_and_a_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    for name in (f"{path}#5", f"{path}@train", f"{path}@train#5"):
        assert parse_sft(["--pretrain", "m", "--dataset", name]).dataset == [name]


# The optimizer


@pytest.mark.parametrize(
    "words, said",
    [
        (["--plugin", "gemini", "--optim", "lion"], "--optim lion: --plugin gemini trains with"),
        (["--plugin", "zero2", "--optim", "adafactor"], "--plugin zero2 gives it flat shards"),
        (["--tp", "2", "--optim", "adafactor"], "--tp 2 splits them"),
        (["--zero_stage", "1", "--optim", "adafactor"], "--plugin 3d --zero_stage 1 gives it flat"),
        (["--optim", "lion", "--adam_beta2", "0.9"], "--adam_beta2 does nothing with --optim lion"),
        (["--optim", "sgd"], "argument --optim: invalid choice: 'sgd'"),
        (["--offload_activations"], "it needs --grad_checkpoint"),
        (["--neftune_alpha", "0"], "--neftune_alpha: expected a number above 0"),
        (["--sft_loss", "focal"], "argument --sft_loss: invalid choice: 'focal'"),
        (["--report_to", "mlflow"], "--report_to mlflow: runs are reported to tensorboard, wandb"),
    ],
)
def test_what_an_optimizer_a_loss_or_a_tracker_cannot_do_is_refused(
    sft, words, said, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    hybrid = {"--plugin", "--tp", "--zero_stage"} & {*words}
    with pytest.raises(SystemExit) as end:
        sft(words if hybrid else ["--plugin", "ddp", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert said in error


def test_names_of_other_libraries_and_what_belongs_together(sft):
    for theirs, ours in {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw8bit",
        "paged_adamw_8bit": "paged_adamw8bit",
        "lion_32bit": "lion",
        "adafactor": "adafactor",
    }.items():
        assert sft(["--optim", theirs]).optim == ours
    args = sft(["--report_to", "wandb,tensorboard", "--save_dir", "o"])
    assert (args.log_dir, args.use_wandb) == ("o/runs", True)
    assert args.report_to == ["tensorboard", "wandb"]
    assert sft(["--use_wandb", "--report_to", "none"]).report_to == ["wandb"]


def test_a_pinned_torch_has_no_muon(sft, monkeypatch, capsys):
    from coati.parallel import optimizer_table

    monkeypatch.setattr(optimizer_table, "release_of", lambda name: (2, 5))
    with pytest.raises(SystemExit):
        sft(["--optim", "muon"])
    assert "--optim muon came with torch 2.9, installed is 2.5" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["dpo", "rm", "grpo"])
def test_the_losses_of_a_token_belong_to_sft_and_pretrain(verb):
    from coati.recipes.command import load

    for flag in ("--sft_loss", "--neftune_alpha"):
        assert load(verb).parser().action_of(flag) is None
    assert load(verb).parser().action_of("--optim") is not None
