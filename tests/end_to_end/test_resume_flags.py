"""Flags that differ from a checkpoint's, each in a run that goes on from it: the first step has the
new value, or the flag is refused by name, or nothing changes."""

import json
import math
import shutil

import pytest

from coati.cli.resume_flags import APPLIED, CLASS_OF, FREE, SAME
from tests.distributed.spawn import run
from tests.end_to_end.inputs import ROOT, prepare, short_lines, write_model
from tests.end_to_end.resume_grid import Attempt, Reached, folder_of

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
SAMPLES = ROOT / "examples" / "data"
STEPS = 3  # of the checkpoint
COMMON = ("--batch_size", "2", "--accumulation_steps", "2", "--max_length", "96")
SCHEDULE = ("--lr", "1e-3", "--warmup_steps", "0", "--max_epochs", "2", "--max_steps", "3")


def cosine(step: int, total: int, warmup: int = 0, floor: float = 0.1) -> float:
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / (total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


# verb -> {name: (words after those of the checkpoint, what the first step then has)}
ALL = ("--max_steps", "12")  # so that there is a fourth step
SFT: dict[str, tuple[tuple[str, ...], dict]] = {
    "lr": (("--lr", "1e-4"), {"lr": [1e-4 * cosine(3, 12)]}),
    "warmup_steps": (("--warmup_steps", "6"), {"lr": [1e-3 * 4 / 6]}),
    "lr_scheduler": (("--lr_scheduler", "linear"), {"lr": [1e-3 * (1 - 0.9 * 3 / 12)]}),
    "lr_min_ratio": (("--lr_min_ratio", "0.5"), {"lr": [1e-3 * cosine(3, 12, floor=0.5)]}),
    "decay_ratio": (
        ("--lr_scheduler", "wsd", "--decay_ratio", "1"),
        {"lr": [1e-3 * (1 - 0.9 * 3 / 12)]},
    ),
    "max_steps": (("--max_steps", "6"), {"lr": [1e-3 * cosine(3, 6)]}),
    "max_epochs": (("--max_epochs", "1", "--max_steps", "8"), {"lr": [1e-3 * cosine(3, 7)]}),
    "batch_size": (("--batch_size", "1", "--max_steps", "20"), {"rows": 2}),
    "accumulation_steps": (("--accumulation_steps", "1"), {"rows": 2}),
    "weight_decay": (("--weight_decay", "7"), {"decay": [7.0]}),
    "adam_beta2": (("--adam_beta2", "0.5"), {"betas": [(0.9, 0.5)]}),
    "grad_clip": (("--grad_clip", "0.25"), {"clip": 0.25}),
    "plugin": (("--plugin", "zero2"), {"plugin": "zero2"}),
    "disable_loss_mask": (("--disable_loss_mask",), {}),
    "eval_dataset": (("--eval_dataset", "$eval"), {}),
    "early_stopping_patience": (
        ("--eval_dataset", "$eval", "--early_stopping_patience", "2"),
        {},
    ),
    "pretrain": (("--pretrain", "$other"), {}),
    "tokenizer_dir": (("--tokenizer_dir", "$tokenizer"), {}),
    "seed": (("--seed", "7"), {}),
    "max_length": (("--max_length", "95"), {}),
    "max_samples": (("--max_samples", "20"), {}),
    "packing": (("--packing",), {}),
    "eval_ratio": (("--eval_ratio", "0.2"), {}),
    "lora_rank": (("--lora_rank", "4"), {}),
    "save_interval": (("--save_interval", "5"), {}),
    "keep_last_k": (("--keep_last_k", "9"), {}),
    "log_interval": (("--log_interval", "3"), {}),
    "grad_checkpoint": (("--grad_checkpoint",), {}),
    "embedding_lr": (("--embedding_lr", "1e-4"), {}),
}
# Its checkpoint is of a run with --embedding_lr 1e-2.
PRETRAIN: dict[str, tuple[tuple[str, ...], dict]] = {
    "own rate": (("--embedding_lr", "1e-4"), {"lr": [1e-3 * cosine(3, 12), 1e-4 * cosine(3, 12)]}),
    "documents": (("--documents", "line"), {}),
    "packing": (("--packing", "false"), {}),
    "dataset_weights": (("--dataset_weights", "1", "2"), {}),
}
DPO: dict[str, tuple[tuple[str, ...], dict]] = {
    "beta": (("--beta", "0.37"), {"objective": "beta=0.37"}),
    "loss_type": (("--loss_type", "hinge_loss"), {"objective": "hinge"}),
    "label_smoothing": (("--label_smoothing", "0.21"), {"objective": "0.21"}),
    "sft_coef": (("--sft_coef", "0.33"), {"objective": "0.33"}),
    "length_normalization": (("--length_normalization",), {"objective": "averaged=True"}),
    "disable_reference_model": (("--disable_reference_model",), {}),
    "precompute_ref": (("--precompute_ref",), {}),
}
RM: dict[str, tuple[tuple[str, ...], dict]] = {
    "head_lr": (("--head_lr", "1e-2"), {}),
    "center_coef": (("--center_coef", "0.1"), {}),
    "loss_fn": (("--loss_fn", "log_exp"), {"objective": "log_exp"}),
}
# An episode has two steps; the checkpoint is of the first of three.
PPO: dict[str, tuple[tuple[str, ...], dict]] = {
    "lr": (("--lr", "1e-4"), {"lr": [1e-4 * cosine(2, 6)]}),
    "critic_lr": (("--critic_lr", "1e-4"), {"critic_lr": [1e-4 * cosine(2, 6)]}),
    "num_episodes": (("--num_episodes", "5"), {"lr": [5e-3 * cosine(2, 10)]}),
    "num_update_steps": (("--num_update_steps", "1"), {"lr": [5e-3 * cosine(2, 4)]}),
    "kl_coef": (("--kl_coef", "0.3"), {"kl": (0.3, None, 10000)}),
    "kl_target": (("--kl_target", "2"), {"kl": (0.05, 2.0, 10000)}),
    "gamma": (("--gamma", "0.73"), {"rollouts": "gamma=0.73"}),
    "lam": (("--lam", "0.61"), {"rollouts": "lam=0.61"}),
    "reward_clip": (("--reward_clip", "0.43"), {"rollouts": "reward_clip=0.43"}),
    "reward_normalization": (("--reward_normalization", "running"), {"rollouts": "running"}),
    "clip_eps": (("--clip_eps", "0.17"), {"objective": "clip_low=0.17"}),
    "value_clip": (("--value_clip", "0.19"), {"value": "0.19"}),
    "temperature": (("--temperature", "0.7"), {"temperature": 0.7}),
    "max_seq_len": (("--max_seq_len", "9"), {"rollouts": "max_new_tokens=9"}),
    "critic_pretrain": (("--critic_pretrain", "$model"), {}),
    "inference_batch_size": (("--inference_batch_size", "2"), {}),
}
RATES = ("lr", "critic_lr")
VERBS = {"sft": SFT, "pretrain": PRETRAIN, "dpo": DPO, "rm": RM, "ppo": PPO}
MADE_OF = {"ppo": 2}  # steps of the checkpoint
TOTAL = {"sft": 12, "pretrain": 12, "dpo": 8, "rm": 8}  # two epochs of the pairs have no more
FLAG = {"own rate": "embedding_lr"}  # of a case that has another name
GUARDED = ("head_lr", "embedding_lr", "center_coef")  # applied, but for the step from or to nothing


@pytest.fixture(scope="module")
def places(tmp_path_factory, model, data) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    lines = short_lines(0, 40, SAMPLES / "preference.jsonl")
    tokenizer = folder / "tokenizer"
    shutil.copytree(model, tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"][0]["lstrip"] = True  # splits a little otherwise
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    return {
        "model": model,
        "other": write_model(folder / "other", intermediate_size=48),
        "tokenizer": str(tokenizer),
        "train": data["train"],
        "text": str(SAMPLES / "text.txt"),
        "eval": data["eval"],
        "pairs": prepare(folder / "pairs", lines, type="preference"),
    }


def rollouts(words, save_dir: str, more: tuple[str, ...]) -> list[str]:
    own = ("--num_collect_steps", "1", "--save_interval", "1", "--plugin", "ddp")
    length = ("--num_episodes", "3" if more else "1", "--critic_lr", "5e-3")
    return words("ppo", save_dir, *own, *length, *more)


def command(verb: str, places: dict[str, str], save_dir: str, more: tuple[str, ...]) -> list[str]:
    data = {"sft": ("train",), "pretrain": ("text", "train")}.get(verb, ("pairs",))
    rows = [places[name] for name in data]
    own = ("--embedding_lr", "1e-2") if verb == "pretrain" else ()
    named = [places[word[1:]] if word.startswith("$") else word for word in more]
    fixed = ["--pretrain", places["model"], "--dataset", *rows, "--save_dir", save_dir]
    return [*fixed, *COMMON, *SCHEDULE, *own, "--save_interval", "1", "--keep_last_k", "1", *named]


@pytest.fixture(scope="module")
def reached(tmp_path_factory, places, online_words) -> dict[str, Reached]:
    """{"verb flag": what became of it}, with "verb" the run that made the checkpoint."""
    folder = tmp_path_factory.mktemp("grid")
    tried: dict[str, Attempt] = {}

    def words_of(verb: str, save_dir: str, more: tuple[str, ...]) -> list[str]:
        if verb == "ppo":
            return rollouts(online_words, save_dir, more)
        return command(verb, places, save_dir, (*ALL, *more) if more else ())

    for verb, flags in VERBS.items():
        script = f"train_{'pt' if verb == 'pretrain' else verb}.py"
        base = folder_of(folder, verb)
        tried[verb] = Attempt(script, words_of(verb, base, ()))
        for flag, (words, _) in {"unchanged": ((), {}), **flags}.items():
            name = f"{verb} {flag}"
            more = (*words, "--checkpoint_path", "auto")
            given = words_of(verb, folder_of(folder, name), more)
            tried[name] = Attempt(script, given, base)
    return run(1, "tests.end_to_end.resume_grid:attempts", tried, env=CPU, timeout=500)[0]


CASES = [(verb, flag) for verb, flags in VERBS.items() for flag in flags]


@pytest.mark.parametrize("verb, flag", CASES)
def test_a_flag_that_differs_from_the_checkpoint(reached, verb, flag):
    found = reached[f"{verb} {flag}"]
    unchanged = reached[f"{verb} unchanged"]
    said = found.err.replace("\n", " ")
    case = flag
    flag = FLAG.get(case, case)
    kind = SAME if case in GUARDED else CLASS_OF[flag]
    assert "Traceback" not in found.err and not found.left
    if kind == SAME:
        assert found.code == 1 and not found.seen, said
        assert "error: --checkpoint_path" in said and f"--{flag} " in said, said
        return
    assert found.code == 0 and found.seen["step"] == MADE_OF.get(verb, STEPS), said
    if kind == FREE:
        assert f"--{flag} " not in said.partition("flags that differ")[2]
        assert found.seen["lr"] == unchanged.seen["lr"]
        return
    assert kind == APPLIED
    line = next(line for line in found.err.splitlines() if "flags that differ from" in line)
    assert f"--{flag} " in line and " on" in line, line
    for name, expected in VERBS[verb][case][1].items():
        value = found.seen[name]
        if isinstance(expected, str) and name != "plugin":
            assert expected in value, value
        elif name in RATES:
            assert value == pytest.approx(expected, rel=1e-12)
        else:
            assert value == expected, (name, value)
        assert value != unchanged.seen[name], name
    if flag != "plugin":
        assert found.seen["moments"] == unchanged.seen["moments"] > 0


@pytest.mark.parametrize("verb", VERBS)
def test_the_run_of_the_checkpoint(reached, verb):
    assert reached[verb].code == 0 and not reached[verb].left, reached[verb].err
    found = reached[f"{verb} unchanged"]
    assert found.code == 0
    if verb == "ppo":
        assert "--num_episodes 1 -> 3" in found.err and "from step 3 on" in found.err
        assert found.seen["lr"][0] == pytest.approx(5e-3 * cosine(2, 6), rel=1e-12)
    else:
        assert "--max_steps 3 -> 12, from step 4 on" in found.err
        rate = 1e-3 * cosine(STEPS, TOTAL[verb])
        assert found.seen["lr"][0] == pytest.approx(rate, rel=1e-12)


PLUGINS = {
    "zero2 with LoRA": ("zero2", "--lora_rank", "4"),
    "zero2 in bf16": ("zero2", "--mixed_precision", "bf16"),
    "gemini": ("gemini", "--mixed_precision", "bf16"),
    "3d": ("3d", "--zero_stage", "1", "--mixed_precision", "bf16"),
}


@pytest.mark.parametrize(
    "name",
    [
        "zero2 with LoRA",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(PLUGINS)[1:]),
    ],
)
def test_the_optimizers_settings_take_effect_on_every_plugin(tmp_path, places, name):
    """Rate, decay and betas in every parameter group, with the moments of the checkpoint."""
    own = ("--plugin", *PLUGINS[name])
    base = str(tmp_path / "base")
    changed = ("--lr", "1e-4", "--weight_decay", "7", "--adam_beta2", "0.5")
    auto = (*ALL, "--checkpoint_path", "auto")
    tried = {
        "base": Attempt("train_sft.py", command("sft", places, base, own)),
        "now": Attempt(
            "train_sft.py",
            command("sft", places, str(tmp_path / "now"), (*own, *changed, *auto)),
            base,
        ),
    }
    found = run(1, "tests.end_to_end.resume_grid:attempts", tried, env=CPU, timeout=300)[0]
    assert found["base"].code == 0 and found["now"].code == 0, found["now"].err
    seen = found["now"].seen
    groups = len(seen["lr"])
    assert seen["lr"] == pytest.approx([1e-4 * cosine(STEPS, 12)] * groups, rel=1e-12)
    assert seen["decay"] == [7.0] * groups and seen["betas"] == [(0.9, 0.5)] * groups
    assert seen["moments"] > 0 and "starts over" not in found["now"].err
