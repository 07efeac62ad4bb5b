"""The Python front door: stages in one process, as the command line trains them, with callbacks,
losses and rewards of the caller's own."""

import inspect
import json

import pytest

import coati
from coati.cli.arguments import sft_parser
from coati.recipes.keyword_flags import LAUNCH
from tests.distributed.spawn import run
from tests.end_to_end.inputs import short_lines, weights, write_model
from tests.end_to_end.worker import Run
from tests.inference.test_end_tokens import SAID, saved
from tests.recipes.stages import DPO, PAIRS, SFT

CASES = "tests.recipes.stages"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in short_lines(0, 24).splitlines()]


@pytest.fixture
def cache(tmp_path_factory):
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }


def words(flags: dict, **more) -> list[str]:
    return [word for name, value in (flags | more).items() for word in (f"--{name}", str(value))]


def test_two_stages_are_those_of_the_command_line_to_the_bit(tmp_path, model, rows, cache):
    place = tmp_path / "python"
    place.mkdir()
    (found,) = run(1, f"{CASES}:two_stages", str(place), model, rows, env=cache)

    assert found["places"] == [
        "output/sft/001",
        "output/sft/001/modeling",
        "output/dpo/001",
        "output/dpo/001/modeling",
    ]
    assert found["left by sft"] == found["left by dpo"] == []
    assert "LlamaForCausalLM" in found["held by generate"]
    assert "step 1 of 4" in found["piped"]
    assert "\r" not in found["piped"] and "Loading" not in found["piped"]  # no bars
    assert found["stopped"] == [False, False]
    steps = [row["step"] for row in found["history"] if "train/loss" in row]
    assert steps == [1, 2, 3, 4]
    assert found["evaluations"][0]["loss"] == found["history"][-2]["eval/loss"]
    assert found["evaluations"][1] == {}
    assert found["answers"][0] == found["one answer"] and len(found["answers"]) == 2
    assert found["sampled"][0] == found["sampled"][1] != found["sampled"][2]
    assert found["saved"] == "final" and found["said"] == found["said again"]
    assert "final: exists already" in found["refused"]

    files = {"rows": rows, "eval": rows[:4], "pairs": PAIRS}
    for name, held in files.items():
        text = "".join(json.dumps(row) + "\n" for row in held)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        files[name] = str(tmp_path / f"{name}.jsonl")
    line = tmp_path / "line"
    given = {"pretrain": model, "dataset": files["rows"], "eval_dataset": files["eval"]}
    sft = words(SFT, **given, lora_rank=4, save_dir=line / "sft")
    adapter = place / "output" / "sft" / "001" / "modeling"
    dpo = words(DPO, pretrain=adapter, dataset=files["pairs"], save_dir=line / "dpo")
    runs = {"sft": Run(sft), "dpo": Run(dpo, script="train_dpo.py")}
    (ended,) = run(1, "tests.end_to_end.worker:train_each", runs, env=cache)
    assert [each.code for each in ended.values()] == [0, 0]
    for stage in runs:
        trained = weights(line / stage)
        assert trained and trained == weights(place / "output" / stage / "001")


def test_callbacks_are_told_and_end_a_run_that_can_go_on(tmp_path, model, rows, cache):
    (found,) = run(1, f"{CASES}:interrupted", str(tmp_path), model, rows, env=cache)

    events = [(event, step) for event, step, _ in found["whole"]]
    steps = [(event, step) for step in (1, 2, 3, 4) for event in ("step", "log")]
    assert events == [("begin", 0), ("evaluate", 0), *steps, ("evaluate", 4), ("end", 4)]
    told = {step: about for event, step, about in found["whole"] if event == "step"}
    assert [told[step]["train/loss"] for step in told] == found["history"]
    assert told[1]["train/lr"] == 1e-3 and told[1]["train/grad_norm"] > 0
    assert found["whole"][-1][2] is False  # stopped_early

    events = [(event, step) for event, step, _ in found["cut"]]
    steps = [(event, step) for step in (1, 2) for event in ("step", "log")]
    assert events == [("begin", 0), ("evaluate", 0), *steps, ("save", 2), ("end", 2)]
    assert found["cut"][-2][2] == "epoch-0_step-2" and found["cut"][-1][2] is True
    assert found["stopped"] and found["path"] == "cut/epoch-0_step-2/modeling"
    assert not found["again"] and found["same"]


def test_the_built_in_losses_written_as_functions_train_the_same(tmp_path, model, rows, cache):
    (same,) = run(1, f"{CASES}:own_losses", str(tmp_path), model, rows, env=cache, timeout=240)
    assert same == dict.fromkeys(["sft 1", "dpo 1", "sft 4", "dpo 4", "grpo"], True)


def test_rewards_of_functions_and_a_reward_model(tmp_path, model, cache):
    (found,) = run(1, f"{CASES}:rewarded", str(tmp_path), model, env=cache, timeout=240)
    assert found["pairs"][0] == pytest.approx(found["pair"], abs=1e-5)
    assert found["pair"][0] > found["pair"][1]
    assert found["messages"] == pytest.approx(found["pair"][0], abs=1e-5)
    assert found["asked"][0][0] == 8 and found["asked"][0][1] in set("12345678")

    steps = [(event, number) for event, number, _ in found["calls"]]
    episode = [("step", 0), ("log", 1), ("step", 1), ("log", 2)]
    assert steps == [("begin", 0), *episode, ("end", 2)]
    logged = [about for event, _, about in found["calls"] if event == "log"]
    rows = [row for row in found["history"] if "train/reward" in row]
    assert [row["train/reward"] for row in rows] == [row["train/reward"] for row in logged]
    parts = {name: logged[0][f"train/reward/{name}"] for name in ("vowels", "near", "lambda")}
    total = parts["vowels"] + 0.5 * parts["near"] + logged[0]["train/reward/reward_model"]
    assert logged[0]["train/reward"] == pytest.approx(total, rel=1e-5) and parts["lambda"] == 0

    flags = json.loads((tmp_path / "output/grpo/001/arguments.json").read_text())
    assert flags["reward_functions"] == ["python:vowels", "python:near", "python:lambda"]
    assert flags["pretrain"] == str(tmp_path / "output/grpo/001/start")
    assert found["grpo"] == "output/grpo/001/actor/modeling"
    assert found["ppo"] == "output/ppo/001/actor/modeling"


def test_rollouts_end_at_every_end_token_of_the_model(tmp_path, cache):
    model = saved(tmp_path / "model", [2, SAID])  # which says the second one at once
    (found,) = run(1, f"{CASES}:ended", str(tmp_path), str(model), env=cache, timeout=240)
    assert found == {"grpo": [[1.0, 1.0]] * 2, "ppo": [[1.0, 1.0]] * 2}


def test_two_ranks_stop_together(tmp_path, model, rows, cache):
    found = run(2, f"{CASES}:on_two_ranks", str(tmp_path), model, rows, env=cache)
    assert [one["place"] for one in found] == ["output/sft/001"] * 2
    assert found[0]["path"] == found[1]["path"] == "output/sft/001/epoch-0_step-3/modeling"
    assert found[0]["answer"] == found[1]["answer"]
    assert len(found[0]["steps"]) == 3 and found[0]["steps"] == found[1]["steps"]
    assert [one["end"] for one in found] == [("end", 3, True)] * 2
    for one in found:
        assert "the ranks hold 2 different sets of rows" in one["refused"]


def test_where_a_run_is_written(tmp_path, model, rows, cache):
    (found,) = run(1, f"{CASES}:placed", str(tmp_path), model, rows, env=cache)
    assert found["places"] == ["told/modeling", "older/modeling", "output/sft/001/modeling"]
    assert found["steps"] == [1, 1, 1]
    assert "--dataset holds 2 rows, one step needs 4" in found["refused"]
    assert found["left"] == ["001"]


def test_a_dry_run_leaves_nothing(tmp_path, model, rows, cache):
    (said,) = run(1, f"{CASES}:rehearsed", str(tmp_path), model, rows, env=cache)
    assert said == "output: there is no such directory; expected that of a run"
    assert list(tmp_path.iterdir()) == []


# What is refused before anything is loaded or written


@pytest.fixture
def empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


TRAINING = (
    *("sft", "pretrain", "rm", "dpo", "orpo", "kto", "gkd", "ilql"),
    *("ppo", "grpo", "online_dpo"),
)


@pytest.mark.parametrize("verb", TRAINING)
def test_a_keyword_that_is_no_flag_names_the_nearest(empty_place, verb):
    with pytest.raises(TypeError) as error:
        getattr(coati, verb)("some/model", [TALK], max_lenght=8)
    assert str(error.value) == (
        f"coati.{verb}: unknown keyword 'max_lenght'; did you mean max_length?"
    )
    assert list(empty_place.iterdir()) == []


def test_a_keyword_may_have_the_name_of_another_library(empty_place):
    with pytest.raises(TypeError, match="lr and learning_rate set the same"):
        coati.sft("some/model", [TALK], lr=1e-5, learning_rate=1e-5)
    with pytest.raises(ValueError, match="warmup_ratio: it is a share of all steps"):
        coati.sft("some/model", [TALK], warmup_ratio=0.1)
    with pytest.raises(ValueError, match="argument --lr: expected a number above 0"):
        coati.sft("some/model", [TALK], learning_rate=-1.0, output_dir="mine")


def test_processes_are_the_launchers(empty_place):
    with pytest.raises(ValueError, match="start the script with torchrun"):
        coati.sft("some/model", [TALK], nproc=2)
    assert "nproc" not in inspect.signature(coati.sft).parameters


def test_values_are_checked_by_the_commands_own_parser(empty_place, capsys):
    cases = {
        "argument --lr: expected a number above 0, found '-1'": {"lr": -1},
        "argument --max_steps: expected a whole number of at least 1, found '2.5'": {
            "max_steps": 2.5
        },
        "argument --use_wandb: is a switch": {"use_wandb": "perhaps"},
        "--lora_alpha does nothing without LoRA": {"lora_alpha": 8},
        "checkpoint_path 'auto' looks in save_dir": {"checkpoint_path": "auto"},
        "--eval_dataset nowhere.jsonl: there is no such file": {"eval_dataset": "nowhere.jsonl"},
    }
    for said, flags in cases.items():
        with pytest.raises(ValueError, match="^coati.sft: ") as error:
            coati.sft("some/model", [TALK], **flags)
        assert said in str(error.value)
    with pytest.raises(TypeError, match="coati.sft: lr is object"):
        coati.sft("some/model", [TALK], lr=object())
    assert not (empty_place / "output").exists()
    assert capsys.readouterr().err == ""


def test_what_the_functions_refuse_themselves(empty_place):
    cases = [
        (lambda: coati.dpo("m", PAIRS, loss=len, loss_type="ipo_loss"), "loss_type does nothing"),
        (lambda: coati.grpo("m", PAIRS, loss=len, policy_loss="gspo"), "policy_loss does nothing"),
        (lambda: coati.ppo("m", PAIRS, loss=len, dual_clip=3), "dual_clip does nothing"),
        (lambda: coati.online_dpo("m", PAIRS, loss=len, gamma=1.0), "gamma does nothing"),
        (lambda: coati.grpo("m", PAIRS, reward=len, reward_functions=["length"]), "beside reward"),
        (lambda: coati.grpo("m", PAIRS, reward=["lenght"]), "did you mean length?"),
        (lambda: coati.grpo("m", PAIRS), "nothing gives a reward"),
        (lambda: coati.grpo("m", PAIRS, reward=3), "reward is int"),
        (lambda: coati.sft("m", [TALK], callbacks=[coati.Callback]), "not the class itself"),
        (lambda: coati.sft(TALK, [TALK]), "pretrain is list"),
        (lambda: coati.TrainedModel("nowhere").path, "nowhere: there is no such directory"),
    ]
    for call, said in cases:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert said in str(error.value)
    assert not (empty_place / "output").exists()


def test_help_and_completion_know_the_flags():
    parameters = inspect.signature(coati.sft).parameters
    flags = {action.dest for action in sft_parser().documented()} - {"help", *LAUNCH}
    assert flags <= set(parameters)
    assert parameters["lr"].default == 5e-6 and parameters["dataset"].default is inspect._empty
    assert "    warmup_steps: optimizer steps of linear warmup" in inspect.getdoc(coati.sft)
