"""The flags of the preference scripts: defaults, what belongs together, what older documents
wrote."""

import subprocess
import sys

import pytest

from coati.cli import preferences
from tests.cli.documented import documented_commands
from tests.cli.flat import parse_dpo, parse_kto, parse_orpo, parse_rm

PARSE = {"rm": parse_rm, "dpo": parse_dpo, "orpo": parse_orpo, "kto": parse_kto}

# Defaults of the reference where they are not those of train_sft.py; precision and plugin follow
# the machine.
REFERENCE = {
    "rm": {
        "--max_length": 2048,
        "--loss_fn": "log_sig",
        "--accumulation_steps": 8,
        "--lr": 5e-6,
        "--max_epochs": 3,
    },
    "dpo": {
        "--max_length": 2048,
        "--loss_type": "dpo_loss",
        "--length_normalization": False,
        "--accumulation_steps": 1,
        "--microbatch_size": 2,
        "--disable_reference_model": False,
        "--disable_loss_mask": False,
    },
    "orpo": {
        "--max_length": 2048,
        "--lam": 0.1,
        "--accumulation_steps": 8,
        "--disable_loss_mask": False,
    },
    "kto": {
        "--max_length": 2048,
        "--beta": 0.1,
        "--desirable_weight": 1.0,
        "--undesirable_weight": 1.0,
        "--auto_weight": False,
        "--accumulation_steps": 8,
    },
}


@pytest.fixture
def parse(data):
    """``parse(name, words)`` with the required flags given."""
    return lambda name, words=(): PARSE[name](
        ["--pretrain", "m", "--dataset", data["dataset"], *words]
    )


@pytest.mark.parametrize(
    "name, flag", [(name, flag) for name, flags in REFERENCE.items() for flag in flags]
)
def test_flags_of_the_reference_with_their_defaults(name, flag):
    parser = getattr(preferences, f"{name}_parser")()
    assert parser.get_default(parser.action_of(flag).dest) == REFERENCE[name][flag]


@pytest.mark.parametrize(
    "words, beta, gamma",
    [
        ([], 0.1, 0.0),
        (["--loss_type", "simpo_loss"], 2.0, 1.4),
        (["--loss_type", "simpo_loss", "--beta", "0.1", "--gamma", "0.6"], 0.1, 0.6),
        (["--loss_type", "ipo_loss", "--beta", "0.3"], 0.3, 0.0),
        (["--gamma", "0.5"], 0.1, 0.5),
    ],
)
def test_beta_and_gamma_are_those_of_the_loss_unless_given(parse, words, beta, gamma):
    args = parse("dpo", words)
    assert (args.beta, args.gamma) == (beta, gamma)


def test_losses_are_named_as_trl_names_them_and_added_up(parse):
    assert parse("dpo").loss_type == ["dpo_loss"]
    args = parse(
        "dpo", ["--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", "0.8", "0.2", "1"]
    )
    assert args.loss_type == ["dpo_loss", "bco_pair", "sft"]
    assert (args.loss_weights, args.beta, args.gamma) == ([0.8, 0.2, 1.0], 0.1, 0.0)
    args = parse("dpo", ["--loss_type", "dpo_loss", "simpo_loss"])
    assert (args.beta, args.gamma, args.loss_weights) == (None, None, None)  # each its own


@pytest.mark.parametrize(
    "name, words, said",
    [
        (
            "dpo",
            ["--loss_type", "sft"],
            "--loss_type sft has no loss over pairs; add one (dpo_loss",
        ),
        (
            "dpo",
            ["--loss_type", "ipo", "ipo_loss"],
            "--loss_type ipo_loss ipo_loss names ipo_loss twice",
        ),
        (
            "dpo",
            ["--loss_type", "dpo_loss", "sft", "--loss_weights", "0.5"],
            "--loss_weights 0.5: found 1 weights, expected 2, one for each loss of --loss_type "
            "dpo_loss",
        ),
        ("dpo", ["--loss_weights", "0"], "argument --loss_weights: expected a number above 0"),
        (
            "dpo",
            ["--loss_type", "dpo_loss", "sft", "--sft_coef", "1"],
            "--loss_type dpo_loss sft and --sft_coef 1 both weigh the chosen response's own loss",
        ),
        (
            "dpo",
            ["--loss_type", "hinge", "apo_zero", "--gamma", "1"],
            "--gamma does nothing with --loss_type hinge_loss apo_zero; it belongs to dpo_loss or",
        ),
        (
            "dpo",
            ["--loss_type", "dpo_loss", "ipo", "--ld_alpha", "0.5"],
            "averages (ipo_loss) have none",
        ),
        ("dpo", ["--loss_type", "dpo"], "invalid choice: 'dpo'"),
        (
            "dpo",
            ["--loss_type", "ipo_loss", "--gamma", "1"],
            "--gamma does nothing with --loss_type ipo_loss",
        ),
        (
            "dpo",
            ["--loss_type", "hinge_loss", "--label_smoothing", "0.1"],
            "belongs to dpo_loss or robust",
        ),
        ("dpo", ["--loss_type", "robust"], "--loss_type robust needs --label_smoothing"),
        ("dpo", ["--label_smoothing", "0.5"], "argument --label_smoothing: expected a number"),
        (
            "dpo",
            ["--label_smoothing", "0.1", "--gamma", "0.1"],
            "--label_smoothing takes no --gamma",
        ),
        (
            "dpo",
            ["--ld_alpha", "0.5", "--length_normalization"],
            "--ld_alpha weighs tokens of a sum",
        ),
        (
            "dpo",
            ["--loss_type", "simpo_loss", "--precompute_ref"],
            "--precompute_ref does nothing with --loss",
        ),
        (
            "dpo",
            ["--disable_reference_model", "--ref_tp", "2"],
            "--ref_tp does nothing with --disable_reference_model",
        ),
        ("dpo", ["--ref_tp", "2", "--plugin", "zero2"], "--ref_tp 2 belongs to --plugin 3d"),
        ("dpo", ["--ref_tp", "2"], "it divides --tp 1"),
        (
            "dpo",
            ["--pp", "2", "--microbatch_size", "3", "--batch_size", "6"],
            "--microbatch_size 3 would split a pair",
        ),
        (
            "rm",
            ["--pp", "2", "--batch_size", "8"],
            "a reward model cannot be split into pipeline stages",
        ),
        (
            "rm",
            ["--tp", "2", "--plugin", "gemini"],
            "--tp 2 under gemini: the gradients of a reward model's head",
        ),
        ("rm", ["--disable_loss_mask"], "--disable_loss_mask does nothing for a reward model"),
        ("rm", ["--loss_fn", "mse"], "invalid choice: 'mse'"),
        ("kto", ["--pp", "2", "--batch_size", "8"], "KTO needs log-probs of a whole global batch"),
        (
            "kto",
            ["--desirable_weight", "0"],
            "argument --desirable_weight: expected a number above 0",
        ),
        ("kto", ["--precompute_ref"], "unknown flag --precompute_ref"),
        ("orpo", ["--gamma", "0.1"], "unknown flag --gamma"),
        (
            "orpo",
            ["--metric_for_best", "loss"],
            "--metric_for_best does nothing without --eval_dataset",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(parse, refused, monkeypatch, name, words, said):
    if "--pp" in words or "--tp" in words:
        monkeypatch.setenv("WORLD_SIZE", "2")
        if name in ("rm", "kto"):
            words = [*words, "--accumulation_steps", "1"]
    if said.startswith("--metric"):
        words = [*words, "--dataset", __file__]
    assert said in refused(lambda more: parse(name, more), words)


def test_rows_of_a_pair_count_for_the_pipeline(parse, monkeypatch):
    """One pair is two rows: two micro-batches of 2 for two stages need two pairs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse("dpo", ["--pp", "2", "--batch_size", "2"]).microbatch_size == 2
    with pytest.raises(SystemExit):
        parse("dpo", ["--pp", "2", "--batch_size", "1"])


@pytest.mark.parametrize(
    "command", documented_commands("rm"), ids=lambda command: command.source + command.text[60:90]
)
def test_documented_reward_models_parse(command, data, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(command.processes))
    words = command.words(
        data | {"SFT_MODEL_PATH": "some/model", "REWARD_MODEL_PATH": "some/rm.pt"}
    )
    script = next(
        position for position, word in enumerate(words) if word.endswith("train_reward_model.py")
    )
    args = parse_rm(words[script + 1 :])
    assert (args.loss_fn, args.plugin, args.save_dir, args.max_samples) == (
        "log_exp",
        "zero2",
        "some/rm",
        100,
    )
    assert (
        len(capsys.readouterr().err.splitlines()) == 4
    )  # --model, --strategy, --test and .pt, a line each


@pytest.mark.parametrize(
    "name, words, value, said",
    [
        ("rm", ["--test", "True"], ("max_samples", 100), "--test is now --max_samples 100"),
        ("rm", ["--test", "False"], ("max_samples", None), None),
        ("rm", ["--save_path", "rm.pt"], ("save_dir", "rm"), "saved in rm/modeling"),
        ("rm", ["--loss_func", "log_exp"], ("loss_fn", "log_exp"), "--loss_func is now --loss_fn"),
        ("rm", ["--max_len", "512"], ("max_length", 512), None),
        ("dpo", ["--model_type", "llama"], ("pretrain", "m"), "--model_type llama has no effect"),
        (
            "dpo",
            ["--enable_reference_model", "False"],
            ("disable_reference_model", True),
            "its opposite is",
        ),
        (
            "dpo",
            ["--enable_reference_model", "True"],
            ("disable_reference_model", False),
            "is the default now",
        ),
        (
            "orpo",
            ["--disable_reference_model"],
            ("pretrain", "m"),
            "--disable_reference_model has no effect here",
        ),
    ],
)
def test_older_flags(parse, capsys, name, words, value, said):
    args = parse(name, words)
    assert getattr(args, value[0]) == value[1]
    lines = capsys.readouterr().err.splitlines()
    assert (lines == []) if said is None else (len(lines) == 1 and said in lines[0])


def test_a_hub_name_and_its_subset(capsys):
    args = parse_rm(
        ["--pretrain", "m", "--dataset", "Anthropic/hh-rlhf", "--subset", "harmless-base"]
    )
    assert args.dataset == ["Anthropic/hh-rlhf:harmless-base"]
    assert "--subset harmless-base is now part of the name" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["no/where/at/all", "./gone/x", "nowhere", "tests/gone"])
def test_a_missing_path_is_not_taken_for_a_hub_name(refused, path):
    assert f"--dataset {path}: there is no such file or directory" in refused(
        parse_rm, ["--pretrain", "m", "--dataset", path]
    )


@pytest.mark.parametrize("name", PARSE)
def test_help_loads_no_torch(name):
    modules = "('torch', 'transformers', 'colossalai', 'numpy')"
    loaded = f"import sys; print([m for m in {modules} if m in sys.modules])"
    parse = f"from tests.cli.flat import parse_{name}\ntry: parse_{name}(['--help'])"
    program = f"{parse}\nfinally: {loaded}"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0 and run.stdout.endswith("[]\n"), run.stderr
