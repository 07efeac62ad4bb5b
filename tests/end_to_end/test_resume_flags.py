"""Flags that differ from a checkpoint's, each in a run that goes on from it: the first step has the
new value, or the flag is refused by name, or nothing changes."""

import json
import shutil
from pathlib import Path

import pytest

from coati.cli.resume_flags import APPLIED, CLASS_OF, FREE, SAME
from tests.cli.test_resume_flags import FLAGS
from tests.distributed.spawn import run
from tests.end_to_end.inputs import ROOT, prepare, short_lines, write_model
from tests.end_to_end.online_inputs import MAX_LENGTH, write_reward_model
from tests.end_to_end.resume_cases import GROUPS, cosine
from tests.end_to_end.resume_grid import Attempt, Reached, folder_of

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
SAMPLES = ROOT / "examples" / "data"
COMMON = ("--batch_size", "2", "--accumulation_steps", "2", "--max_length", "96")
SCHEDULE = ("--lr", "1e-3", "--warmup_steps", "0", "--max_epochs", "2", "--max_steps", "3")
ALL = ("--max_steps", "12")  # so that there is a fourth step
AUTO = ("--checkpoint_path", "auto")
ONLINE = ("ppo", "grpo", "online-dpo")
SCRIPTS = {"pretrain": "pt", "online-dpo": "online_dpo"}  # others are named after the verb
STEPS = {"ppo": 2, "grpo": 4, "online-dpo": 2}  # of the checkpoint, else 3
TOTAL = {"sft": 12, "dpo": 8, "rm": 8, "ppo": 6}  # two epochs of the pairs have no more
RATES = ("lr", "critic_lr")
# Of a class that holds but for the step from or to nothing: "group flag" -> its class here.
GUARDED = {
    **{"rm head_lr": SAME, "rm center_coef": SAME, "sft embedding_lr": SAME},
    **{"dpo embedding_lr": SAME, "sft with LoRA lora_plus_ratio": SAME},
    "ppo ptx_dataset": APPLIED,
}
# What the weights of the first step do not show: evaluations, clipping at a ratio of 1, a KL
# coefficient that moves after it, rollouts of older weights, time limits, and another way to write
# the same loss.
LATER = {
    *("rollouts_ahead", "rollout_is", "rollout_is_cap", "rollout_is_mask"),
    *("eval_dataset", "eval_batch_size", "eval_interval", "eval_prompt_dataset"),
    *("metric_for_best", "early_stopping_patience", "early_stopping_threshold"),
    *("clip_eps", "clip_eps_low", "clip_eps_high", "value_clip", "kl_target", "kl_horizon"),
    *("reward_timeout", "loss_fn", "dual_clip", "dynamic_sampling"),
    *("eval_pass_at", "eval_generations", "eval_right", "target_alpha", "target_interval"),
}
# The same numbers, added up in another order.
ROUNDED = {
    *("inference_batch_size", "logits_forward_batch_size", "ref_tp"),
    *("tokens_per_batch", "precompute_ref"),
}
LAYOUT = {"plugin", "plugin_args", "mixed_precision", "optim", *GROUPS["split"].flags}


@pytest.fixture(scope="module")
def places(tmp_path_factory, model, data, online_places) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    lines = short_lines(0, 40, SAMPLES / "preference.jsonl")
    labeled = [{"prompt": f"q{i}", "completion": "yes", "label": i % 5 < 3} for i in range(30)]
    tokenizer = folder / "tokenizer"
    shutil.copytree(model, tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"][0]["lstrip"] = True  # splits a little otherwise
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    template = json.loads(Path(online_places["template"]).read_text())
    lora = {"r": 4, "lora_alpha": 16}
    files = {
        "other_template": template | {"system_message": "Be brief."},
        "plugin_args": {"bucket_cap_mb": 13},
        "config": {"log_interval": 2},
        "lora": lora,
        "other_lora": lora | {"lora_alpha": 24},
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "hosts").write_text("localhost slots=1\n")
    return online_places | {
        **{name: str(folder / f"{name}.json") for name in files},
        "hosts": str(folder / "hosts"),
        "other": write_model(folder / "other", intermediate_size=48),
        "other_rm": write_reward_model(folder / "other_rm", seed=5),
        "tokenizer": str(tokenizer),
        "other_ptx": prepare(folder / "other_ptx", short_lines(60, 30), MAX_LENGTH),
        "train": data["train"],
        "text": str(SAMPLES / "text.txt"),
        "held_out": data["eval"],
        "pairs": prepare(folder / "pairs", lines, type="preference"),
        "kto": prepare(
            folder / "kto", "".join(f"{json.dumps(row)}\n" for row in labeled), type="kto"
        ),
        "scored": prepare(
            folder / "scored", "".join(f"{json.dumps(row)}\n" for row in labeled), type="scored"
        ),
    }


@pytest.fixture(scope="module")
def words_of(places, online_words):
    """``words_of(verb, save_dir, more)``: "$name" stands for a place, "$save" for ``save_dir``."""

    def named(word: str, save_dir: str) -> str:
        if not word.startswith("$"):
            return word
        known = places | {"save": save_dir}
        name = next(name for name in sorted(known, key=len)[::-1] if word[1:].startswith(name))
        return known[name] + word[1 + len(name) :]

    def words(verb: str, save_dir: str, more: tuple[str, ...]) -> list[str]:
        if verb in ONLINE:
            own = ("--num_collect_steps", "1", "--save_interval", "1", "--plugin", "ddp")
            length = ("--num_episodes", "3" if AUTO[0] in more else "1")
            if verb == "ppo":
                length += ("--critic_lr", "5e-3")
            given = (*own, *length, *more)
            script = verb.replace("-", "_")
            return online_words(script, save_dir, *(named(word, save_dir) for word in given))
        named_rows = {
            "sft": ["train"],
            "gkd": ["train"],
            "kto": ["kto"],
            "ilql": ["scored"],
            "pretrain": ["text", "train"],
        }
        rows = [places[name] for name in named_rows.get(verb, ["pairs"])]
        fixed = ["--pretrain", places["model"], "--dataset", *rows, "--save_dir", save_dir]
        length = ALL if AUTO[0] in more else ()
        given = (*COMMON, *SCHEDULE, "--save_interval", "1", "--keep_last_k", "1", *length, *more)
        return [*fixed, *(named(word, save_dir) for word in given)]

    return words


@pytest.fixture(scope="module")
def reached(tmp_path_factory, words_of) -> dict[str, Reached]:
    """{"group flag": what became of it}, with "group" the run that made the checkpoint."""
    folder = tmp_path_factory.mktemp("grid")
    tried: dict[int, dict[str, Attempt]] = {1: {}, 2: {}}
    for name, group in GROUPS.items():
        script = f"train_{SCRIPTS.get(group.verb, group.verb)}.py"
        base = folder_of(folder, name)
        tried[group.nproc][name] = Attempt(script, words_of(group.verb, base, group.own))
        for flag, (more, _) in {"unchanged": ((), {}), **group.flags}.items():
            save_dir = folder_of(folder, f"{name} {flag}")
            given = words_of(group.verb, save_dir, (*group.own, *AUTO, *more))
            tried[group.nproc][f"{name} {flag}"] = Attempt(script, given, base)
    base = folder_of(folder, "sft")
    others: dict[str, tuple[int, tuple[str, ...]]] = {
        "nproc": (2, (*AUTO, "--nproc", "2")),
        "dry": (1, (*AUTO, "--dry_run")),
        "anew": (1, ("--checkpoint_path", "$save/epoch-0_step-3", "--checkpoint_weights_only")),
    }
    for name, (nproc, more) in others.items():
        more += ("--save_dir", "$save-new") if name == "anew" else ()
        given = words_of("sft", folder_of(folder, f"sft {name}"), more)
        tried[nproc][f"sft {name}"] = Attempt("train_sft.py", given, base)
    found: dict[str, Reached] = {}
    for nproc, some in tried.items():
        target = "tests.end_to_end.resume_grid:attempts"
        found |= run(nproc, target, some, env=CPU, timeout=500)[0]
    return found


CASES = [(name, flag) for name, group in GROUPS.items() for flag in group.flags]


def class_of(name: str, flag: str) -> str:
    return GUARDED.get(f"{name} {flag}", CLASS_OF[flag])


def told(found: Reached) -> str:
    """The line about the flags that differ."""
    return next(line for line in found.err.splitlines() if "flags that differ from" in line)


@pytest.mark.parametrize("name, flag", CASES)
def test_a_flag_that_differs_from_the_checkpoint(reached, name, flag):
    found = reached[f"{name} {flag}"]
    unchanged = reached[f"{name} unchanged"]
    said = found.err.replace("\n", " ")
    kind = class_of(name, flag)
    assert "Traceback" not in found.err and not found.left
    if kind == SAME:
        assert found.code == 1 and not found.seen, said
        assert "error: --checkpoint_path" in said and f"--{flag}" in said, said
        return
    assert found.code == 0 and found.seen["step"] == STEPS.get(GROUPS[name].verb, 3), said
    if kind == FREE:
        assert f"--{flag} " not in told(found)
        # The flag itself, or the reference model in another form, may be part of these.
        about = {"schedule", "options", "rollouts", "objective", "reference"}
        about |= {"weights", "sizes"} if flag in ROUNDED else set()
        changed = {key for key, value in found.seen.items() if value != unchanged.seen[key]}
        assert changed <= about, changed
        assert found.seen["sizes"] == pytest.approx(unchanged.seen["sizes"], rel=1e-5)
        return
    assert kind == APPLIED
    line = told(found)
    assert f"--{flag} " in line and " on" in line, line
    for fact, expected in GROUPS[name].flags[flag][1].items():
        value = found.seen[fact]
        if isinstance(expected, str):
            assert expected in value, value
        elif fact in RATES:
            assert value == pytest.approx(expected, rel=1e-12)
        else:
            assert value == expected, (fact, value)
        assert value != unchanged.seen.get(fact), fact
    if flag not in ROUNDED:
        assert (found.seen["weights"] == unchanged.seen["weights"]) == (flag in LATER)
    assert flag not in LATER or GROUPS[name].flags[flag][1]  # which then show it
    if flag not in LAYOUT:
        assert found.seen["moments"] == unchanged.seen["moments"] > 0
    else:
        assert "optimizer state starts over" in said


@pytest.mark.parametrize("name", GROUPS)
def test_the_run_of_the_checkpoint(reached, name):
    assert reached[name].code == 0 and not reached[name].left, reached[name].err
    found = reached[f"{name} unchanged"]
    assert found.code == 0 and found.seen["moments"] > 0
    verb = GROUPS[name].verb
    done = STEPS.get(verb, 3)
    length = "--num_episodes 1 -> 3" if verb in ONLINE else "--max_steps 3 -> 12"
    assert f"{length}, from step {done + 1} on" in found.err
    if verb in TOTAL and name == verb:
        rate = (5e-3 if verb in ONLINE else 1e-3) * cosine(done, TOTAL[verb])
        assert found.seen["lr"][0] == pytest.approx(rate, rel=1e-12)


def test_more_processes_than_the_checkpoint_was_made_with(reached):
    found = reached["sft nproc"]
    assert "--nproc default -> 2" in told(found) and "world_size 1 -> 2" in found.err
    assert found.code == 0 and found.seen["step"] == 3
    assert found.seen["rows"] == 2 * reached["sft unchanged"].seen["rows"]


def test_the_weights_alone_and_a_dry_run(reached):
    """Neither is a step of the run: one starts anew, the other leaves nothing behind."""
    anew = reached["sft anew"]
    assert anew.code == 0 and anew.seen["step"] == 0 and anew.seen["moments"] == 0
    assert anew.seen["sizes"] != reached["sft unchanged"].seen["sizes"]
    dry = reached["sft dry"]
    assert dry.code == 0 and not dry.seen and "Nothing was kept" in dry.err


# What no run here can show, with the reason.
NOT_RUN = {
    "use_flash_attn": "flash-attn is a GPU's; without one the flag changes nothing, and says so",
    "rollout_engine": "the choice is made anew by every run (make_rollout)",
    **dict.fromkeys(("vllm_memory_share", "vllm_sleep"), "vLLM in the process needs a GPU"),
    **dict.fromkeys(
        ("rollout_url", "rollout_sync", "rollout_weights_dir", "rollout_timeout"),
        "of servers: tests/end_to_end/test_rollout_servers.py",
    ),
    **dict.fromkeys(
        ("rollout_workers", "rollout_worker_cpus", "rollout_worker_gpus"),
        "of a Ray cluster: tests/end_to_end/test_ray.py",
    ),
    **dict.fromkeys(
        ("rollout_python", "ray_address", "rewards_on_ray"),
        "of a Ray cluster: tests/end_to_end/test_ray.py",
    ),
    "rollout_token_env": "of servers: tests/end_to_end/test_rollout_servers.py",
    "push_to_hub": "asks the hub: tests/inference/export/test_hub_upload.py",
    "checkpoint_weights_only": "no resume, but another start: the test above",
    "dry_run": "takes no step of the run: the test above",
    "streaming": "needs raw rows: tests/end_to_end/test_streaming.py",
    "shuffle_buffer": "of streams: tests/end_to_end/test_streaming.py",
    "stream_workers": "of streams: tests/end_to_end/test_streaming.py",
    **dict.fromkeys(
        ("judge_url", "judge_model", "judge_prompt", "judge_pattern", "judge_failed"),
        "asks a server: tests/cli/test_reward_flags.py",
    ),
    "test_timeout": "runs programs in a sandbox: tests/cli/test_reward_flags.py",
    "test_memory": "runs programs in a sandbox: tests/cli/test_reward_flags.py",
    **dict.fromkeys(
        ("teacher_url", "teacher_served_name", "teacher_top_k"),
        "of servers: tests/trainer/test_gkd.py",
    ),
    "max_bad_ratio": "ends a preparation, or a stream, before its rows are trained on",
}
# Flags of coati sft, which all verbs hand to the same functions: the comparison and the refusals
# (recipes/run.py), plugin and optimizer (recipes/build.py), checkpoints and logs (RunLog). What
# rows and batches are is sft's for rm, dpo, orpo, kto and gkd (recipes/offline.py), and coati ppo's
# for grpo (recipes/rl.py).
ROWS_AND_BATCHES = {
    *("accumulation_steps", "eval_interval", "dataset_weights", "max_length", "max_samples"),
    *("eval_ratio", "disable_loss_mask"),
}
# Of raw rows, which the cases of coati pretrain read.
RAW_ROWS = {"columns", "strict_columns"}
BOTH = set(FLAGS["ppo"]) & set(FLAGS["grpo"])
# Flags that a verb only takes to refuse them, and choices of which it has one.
REFUSED = {"pp", "sp", "sp_mode", "enable_sequence_parallelism", "microbatch_size", "add_tokens"}
ONE_CHOICE = {("ppo", "kl_in")}


@pytest.mark.parametrize("verb", FLAGS)
def test_every_flag_is_run_or_listed(verb):
    of_verb = {name: set() for name in FLAGS}
    for group in GROUPS.values():
        of_verb[group.verb] |= set(group.flags)
    run_here = of_verb[verb] | of_verb["sft"] | {"nproc"} | set(NOT_RUN)
    run_here |= RAW_ROWS & of_verb["pretrain"]
    if verb in ONLINE:
        online = of_verb["ppo"] | of_verb["grpo"]
        run_here = run_here - ROWS_AND_BATCHES | online & BOTH | REFUSED
    missing = [f for f in FLAGS[verb] if f not in run_here and (verb, f) not in ONE_CHOICE]
    assert not missing, f"run them in resume_cases.py, or list them in NOT_RUN: {missing}"
    assert set(NOT_RUN) <= set(CLASS_OF) and not set(NOT_RUN) & of_verb[verb]


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
def test_the_optimizers_settings_take_effect_on_every_plugin(tmp_path, words_of, name):
    """Rate, decay and betas in every parameter group, with the moments of the checkpoint."""
    own = ("--plugin", *PLUGINS[name])
    base = str(tmp_path / "base")
    changed = ("--lr", "1e-4", "--weight_decay", "7", "--adam_beta2", "0.5")
    tried = {
        "base": Attempt("train_sft.py", words_of("sft", base, own)),
        "now": Attempt(
            "train_sft.py",
            words_of("sft", str(tmp_path / "now"), (*own, *changed, *AUTO)),
            base,
        ),
    }
    found = run(1, "tests.end_to_end.resume_grid:attempts", tried, env=CPU, timeout=300)[0]
    assert found["base"].code == 0 and found["now"].code == 0, found["now"].err
    seen = found["now"].seen
    groups = len(seen["lr"])
    assert seen["lr"] == pytest.approx([1e-4 * cosine(3, 12)] * groups, rel=1e-12)
    assert seen["decay"] == [7.0] * groups and seen["betas"] == [(0.9, 0.5)] * groups
    assert seen["moments"] > 0 and "starts over" not in found["now"].err
