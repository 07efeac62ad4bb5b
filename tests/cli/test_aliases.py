"""Names of other libraries: the same meaning gives the same settings, another one is refused."""

import re
from pathlib import Path

import pytest

from coati.cli.aliases import (
    DIFFERENT,
    IN_ROLLOUTS,
    MAPPED,
    MAPPED_IN_TRAINING,
    SAME,
    SAME_OF,
    add_aliases,
    names,
)
from coati.cli.nearest import MEANINGS, SCHEMAS, verbs_with
from coati.recipes.command import load
from coati.recipes.command import names as verbs
from coati.recipes.finish import command_again
from coati.utils.logging import forget_warnings

ROOT = Path(__file__).parents[2]


def parse(verb, *words):
    return load(verb).parser().parse_args(list(words))


def values(verb, *words):
    found = dict(vars(parse(verb, *words)))
    for name in ("_given", "_written"):
        found.pop(name)
    return found


HUGGING_FACE = """\
model_name_or_path: gpt2
dataset_name: owner/rows
output_dir: out
learning_rate: 2.0e-5
num_train_epochs: 2
per_device_train_batch_size: 3
per_device_eval_batch_size: 5
gradient_accumulation_steps: 4
gradient_checkpointing: true
max_grad_norm: 0.5
max_seq_length: 99
bf16: true
fp16: false
optim: adamw_torch
logging_steps: 7
save_strategy: steps
save_steps: 11
save_total_limit: 2
eval_strategy: steps
eval_steps: 13
metric_for_best_model: eval_loss
report_to: [wandb, tensorboard]
resume_from_checkpoint: true
use_peft: true
lora_r: 8
lora_alpha: 16
seed: 1
"""
OURS = """\
pretrain: gpt2
dataset: owner/rows
save_dir: out
lr: 2.0e-5
max_epochs: 2
batch_size: 3
eval_batch_size: 5
accumulation_steps: 4
grad_checkpoint: true
grad_clip: 0.5
max_length: 99
mixed_precision: bf16
log_interval: 7
save_interval: 11
keep_last_k: 2
eval_interval: 13
metric_for_best: loss
use_wandb: true
log_dir: out/runs
checkpoint_path: auto
lora_rank: 8
lora_alpha: 16
seed: 1
"""


def words_of(text):
    """The flags of a YAML text as a command line."""
    found = []
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        found += [f"--{key}", *value.strip("[]").replace(",", "").split()]
    return found


@pytest.mark.parametrize("verb", ["sft", "rm", "dpo", "orpo", "kto", "ilql"])
def test_a_run_written_for_hugging_face_means_the_same(verb, tmp_path):
    (tmp_path / "theirs.yaml").write_text(HUGGING_FACE)
    (tmp_path / "ours.yaml").write_text(OURS)
    theirs = values(verb, "--config", f"{tmp_path}/theirs.yaml")
    ours = values(verb, "--config", f"{tmp_path}/ours.yaml")
    assert theirs | {"config": None} == ours | {"config": None}
    assert values(verb, *words_of(HUGGING_FACE)) == ours | {"config": None}
    hyphens = [re.sub(r"(?<=\w)_", "-", word) if "--" in word else word for word in words_of(OURS)]
    assert values(verb, *hyphens) == ours | {"config": None}
    assert sorted(parse(verb, *words_of(HUGGING_FACE))._given) == sorted(
        name for name in parse(verb, *words_of(OURS))._given
    )


@pytest.mark.parametrize("verb", verbs())
def test_every_name_reads_what_its_flag_reads(verb):
    """The same type, choices and number of values, into the same setting."""
    parser = load(verb).parser()
    documented = {flag for action in parser.documented() for flag in action.option_strings}
    add_aliases(parser)
    special = next((row for flag, row in SAME_OF.items() if f"--{flag}" in documented), {})
    for name, flags in (SAME | special).items():
        action = parser.action_of(f"--{name}")
        found = next((flag for flag in flags.split() if f"--{flag}" in documented), None)
        if f"--{name}" in documented:
            continue  # its own flag
        if found is None or ("--num_episodes" in documented and name in IN_ROLLOUTS):
            assert action is None or hasattr(action, "difference")
            continue
        flag = parser.action_of(f"--{found}")
        assert action.dest == flag.dest and action.choices == flag.choices
        if name not in ("resume_from_checkpoint", "metric_for_best_model"):
            assert action.type is flag.type and action.nargs == flag.nargs


def test_the_tables_name_flags_that_there_are():
    """A flag that was renamed would leave its aliases and synonyms behind without a word. Flags
    that other releases have may be missing."""
    known = {
        flag.lstrip("-")
        for verb in verbs()
        for action in load(verb).parser().documented()
        for flag in action.option_strings
    }
    optional = {"eval_ratio", "lr_scheduler"}
    special = [pair for row in SAME_OF.values() for pair in row.items()]
    for name, flags in [*SAME.items(), *special, *MEANINGS.items()]:
        assert set(flags.split()) <= known | optional, name
    for name, row in [*MAPPED.items(), *MAPPED_IN_TRAINING.items()]:
        assert row.flag in known | optional, name
        for chosen in row.values.values():
            assert {dest for dest in chosen if not dest.startswith("_")} <= known | optional, name
    for name, (flag, text) in DIFFERENT.items():
        assert flag in known, name
        assert set(re.findall(r"--(\w+)", text)) <= known, name
    for name, text in IN_ROLLOUTS.items():
        assert set(re.findall(r"--(\w+)", text)) <= known, name


def test_help_and_completion_do_not_show_them():
    parser = load("sft").parser()
    before = parser.format_help(), parser.names()
    add_aliases(parser)
    assert (parser.format_help(), parser.names()) == before
    assert "--learning_rate" not in before[0]


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("sft", ["--lr", "1", "--learning_rate", "1"], "--lr and --learning_rate set the same"),
        ("sft", ["--max_len=3", "--max-length=3"], "--max_len and --max_length set the same"),
        ("sft", ["--bf16", "--fp16"], "--bf16 and --fp16 set the same"),
        ("sft", ["--bf16", "--mixed_precision", "fp32"], "--bf16 and --mixed_precision set"),
        ("grpo", ["--temperature", "1", "--final_temperature", "1"], "set the same"),
        ("sft", ["--bf16", "false"], "--bf16 false does not say which precision"),
        ("sft", ["--learning_rate", "-1"], "argument --learning_rate: expected a number above 0"),
        ("sft", ["--warmup_ratio", "0.1"], "--warmup_ratio: it is a share of all steps"),
        ("sft", ["--tf32", "true"], "--tf32: it is a switch of PyTorch's"),
        ("sft", ["--group_by_length"], "--group_by_length: --packing fills batches"),
        ("sft", ["--deepspeed", "ds.json"], "--deepspeed: ColossalAI's plugins take its place"),
        ("sft", ["--report_to", "mlflow"], "--report_to mlflow: runs are reported to tensorboard"),
        ("sft", ["--report_to", "none,wandb"], "leave none or the others out"),
        ("sft", ["--quantization_bit", "3"], "expected 4 or 8, found '3'; --quantize_base names"),
        ("sft", ["--lora_target_modules", "q_proj"], "--lora_target names all-linear, attention"),
        ("sft", ["--optim", "sgd"], "argument --optim: invalid choice: 'sgd'"),
        ("sft", ["--eval_strategy", "never"], "expected steps, epoch or no, found 'never'"),
        (
            "sft",
            ["--eval_strategy", "no", "--eval_dataset", "e"],
            "the evaluation strategy is no, and --eval_dataset is given; without",
        ),
        ("sft", ["--use_peft", "false", "--lora_r", "8"], "all weights are to be trained, and"),
        ("ppo", ["--num_train_epochs", "3"], "--num_train_epochs: it counts passes over"),
        ("grpo", ["--per_device_train_batch_size", "3"], "it also says how much is collected"),
        ("grpo", ["--save_steps", "3"], "--save_steps: it counts optimizer steps"),
    ],
)
def test_what_would_lose_a_value_or_change_its_meaning_is_refused(verb, words, said, refused):
    text = refused(load(verb).parser().parse_args, words)
    assert said in text and text.count("\n") == 1


def test_the_same_name_twice_is_the_last_one_as_scripts_rely_on():
    """train.sh "$@" appends what overrides its own flags."""
    assert parse("sft", "--lr", "1", "--lr", "2").lr == 2
    assert parse("sft", "--max-length", "8", "--max_length=9").max_length == 9


def test_the_command_line_overrides_a_file_under_any_name(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1\nfp16: true\nreport_to: wandb\n")
    args = parse("sft", f"--config={tmp_path}/run.yaml", "--lr=2", "--bf16", "--report-to", "none")
    assert (args.lr, args.mixed_precision, args.use_wandb) == (2, "bf16", False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nlearning_rate: 1\n", "run.yaml:2: 'learning_rate' repeats line 1"),
        ("fp16: true\nbf16: true\n", "run.yaml:2: 'bf16' repeats line 1"),
        ("\nwarmup_ratio: 0.1\n", "run.yaml:2: warmup_ratio: it is a share of all steps"),
        ("learning_rate: fast\n", "run.yaml:1: learning_rate: expected a number above 0"),
        ("optim: sgd\n", "run.yaml:1: optim: invalid choice: "),
        ("epochs: 3\n", "run.yaml:1: unknown key 'epochs'; did you mean max_epochs?"),
        (
            "no_packing: true\n",
            "run.yaml:1: unknown key 'no_packing'; did you mean packing: false?",
        ),
    ],
)
def test_a_file_is_refused_with_its_line(text, said, tmp_path, refused):
    (tmp_path / "run.yaml").write_text(text)
    assert said in refused(load("sft").parser().parse_args, ["--config", f"{tmp_path}/run.yaml"])


def test_what_several_names_decide_together(capsys):
    forget_warnings()
    assert parse("sft", "--bf16", "false", "--fp16", "false").mixed_precision == "fp32"
    assert parse("sft", "--bf16", "false", "--fp16").mixed_precision == "fp16"
    assert parse("sft", "--use_peft").lora_rank == 16
    for words, kind in (
        (("--load_in_4bit",), "nf4"),
        (("--load_in_8bit", "true"), "int8"),
        (("--quantization_bit", "4"), "nf4"),
    ):
        assert parse("dpo", "--lora_rank", "4", *words).quantize_base == kind
    assert parse("sft", "--lora_r", "4", "--loraplus_lr_ratio", "16").lora_plus_ratio == 16
    assert "--lora_rank is 16" in capsys.readouterr().err
    assert parse("sft", "--finetuning_type", "lora", "--lora_rank", "4").lora_rank == 4
    assert parse("sft", "--report_to", "tensorboard", "--output_dir", "o").log_dir == "o/runs"
    assert parse("sft", "--report_to", "tensorboard", "--logging_dir", "l").log_dir == "l"
    assert parse("sft", "--resume_from_checkpoint", "c").checkpoint_path == "c"
    assert parse("sft", "--resume_from_checkpoint", "false").checkpoint_path is None
    assert parse("sft", "--assistant_only_loss", "false").disable_loss_mask is True
    grpo = parse("grpo", "--temperature", "0.6", "--beta", "0.1", "--use_vllm")
    assert (grpo.initial_temperature, grpo.final_temperature) == (0.6, 0.6)
    assert (grpo.kl_coef, grpo.rollout_engine) == (0.1, "vllm")
    assert parse("dpo", "--beta", "0.1").beta == 0.1
    orpo = [parse("orpo", name, "0.3").lam for name in ("--beta", "--pref_beta")]
    assert orpo == [0.3, 0.3]  # the weight of the odds-ratio loss in TRL and LLaMA-Factory
    with pytest.raises(SystemExit):
        parse("ppo", "--beta", "0.3")  # whose --lam is that of GAE


@pytest.mark.parametrize(
    "verb", ["chat", "serve", "score", "compare", "merge", "export", "measure"]
)
def test_inference_takes_a_model_by_the_names_that_people_type(verb):
    assert parse(verb, "--model_name_or_path", "m").model_path == "m"
    assert parse(verb, "--model", "m").model_path == "m"


def test_training_takes_a_model_by_the_name_that_people_type():
    assert parse("sft", "--model", "m", "--dataset", "r").pretrain == "m"


def test_inference_takes_lengths_and_addresses_of_other_servers():
    args = parse("serve", "--host", "::1", "--port", "8", "--max-model-len", "9", "--load_in_4bit")
    assert (args.http_host, args.http_port, args.model_max_length) == ("::1", 8, 9)
    assert args.quant == "4bit" and parse("chat", "--max_tokens", "7").max_new_tokens == 7


@pytest.mark.parametrize(
    ("verb", "name", "meant"),
    [
        ("sft", "learningrate", "lr"),
        ("sft", "learing_rate", "lr"),
        ("sft", "Learning-Rates", "lr"),
        ("sft", "epochs", "max_epochs"),
        ("sft", "n_epochs", "max_epochs"),
        ("grpo", "epochs", "num_episodes"),
        ("sft", "steps", "max_steps"),
        ("sft", "base_model", "pretrain"),
        ("sft", "data", "dataset"),
        ("sft", "train_data", "dataset"),
        ("sft", "output", "save_dir"),
        ("sft", "output_folder", "save_dir"),
        ("merge", "out", "output_dir"),
        ("sft", "gpus", "nproc"),
        ("sft", "num_gpus", "nproc"),
        ("sft", "precision", "mixed_precision"),
        ("sft", "context_length", "max_length"),
        ("chat", "context_length", "model_max_length"),
        ("chat", "system", "system_message"),
        ("ppo", "critic", "critic_pretrain"),
        ("ppo", "reward", "rm_pretrain"),
        ("sft", "resume", "checkpoint_path"),
        ("sft", "wandb", "use_wandb"),
        ("sft", "bach_size", "batch_size"),
        ("sft", "pretran", "pretrain"),
        ("cache", "days", "older_than"),
        ("prepare", "workers", "num_proc"),
        ("prepare", "dataset", "data_input_dirs"),
        ("prepare", "save_dir", "data_arrow_output_dir"),
        ("prepare", "data_output_dirs", "data_arrow_output_dir"),
        ("prepare", "eval_dataset", "eval_input_dirs"),
        ("sample-prompts", "input", "dataset_path"),
        ("sample-prompts", "dataset", "dataset_path"),
        ("sample-prompts", "output", "save_path"),
    ],
)
def test_an_unknown_name_is_answered_by_meaning(verb, name, meant):
    parser = load(verb).parser()
    add_aliases(parser)
    assert parser.nearest(f"--{name}") == f"; did you mean --{meant}?"


@pytest.mark.parametrize(
    ("verb", "name", "said"),
    [
        ("orpo", "length_normalization", "coati dpo, online-dpo, not of this"),
        ("kto", "disable-reference-model", "coati dpo, online-dpo, not of this"),
        ("grpo", "no_whiten_advantages", "coati ppo, not of this"),
        ("cache", "lora_rank", "coati dpo, fit, gkd and 9 others, not of this"),
    ],
)
def test_a_flag_of_another_verb_is_said_to_be_one(verb, name, said):
    assert load(verb).parser().nearest(f"--{name}") == f"; it is a flag of {said}"


def test_the_schemas_that_say_so_know_every_flag():
    """A flag that one lacks would not be found."""
    for verb in (path.stem for path in SCHEMAS.glob("*.json")):
        for action in load(verb).parser().documented():
            if action.dest not in ("help", "config"):
                assert verb in verbs_with(action.option_strings[0].lstrip("-")), action


def test_a_resumed_command_leaves_out_the_checkpoint_under_any_name(monkeypatch):
    given = ["coati", "sft", "--resume-from-checkpoint", "c", "--lr", "1", "--checkpoint_path=d"]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.delenv("COATI_ERROR_FILE", raising=False)
    assert command_again() == "coati sft --lr 1 --checkpoint_path auto"


def test_the_migration_page_shows_every_name():
    page = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    part = page.partition("## Names that are understood")[2].partition("\n## ")[0]
    shown = set(re.findall(r"`(\w+)`", part.replace("--", "")))
    assert set(names()) <= shown


def test_no_evaluation_is_what_no_rows_for_it_mean():
    assert values("sft", "--eval_strategy", "no") == values("sft")
