"""The flags of PPO and GRPO: defaults, what belongs together, what older documents wrote."""

import json
import subprocess
import sys

import jsonschema
import pytest

from coati.cli import rollouts
from coati.cli.config_file import schema_of
from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.legacy.flags import DROPPED_OF_ROLLOUTS
from tests.cli.documented import documented_commands
from tests.cli.flat import parse_grpo, parse_ppo, parse_prompts

PARSE = {"ppo": parse_ppo, "grpo": parse_grpo, "prompts": parse_prompts}

# Defaults: those of the reference but for accumulation (the buffer equation), GRPO's KL and
# sampling.
DEFAULTS = {
    "ppo": {
        "--num_episodes": 1,
        "--num_collect_steps": 2,
        "--num_update_steps": 5,
        "--train_batch_size": 16,
        "--experience_batch_size": 16,
        "--ptx_batch_size": 4,
        "--accumulation_steps": 2,
        "--lr": 9e-6,
        "--critic_lr": 9e-6,
        "--kl_coef": 0.1,
        "--kl_estimator": "k1",
        "--kl_in": "reward",
        "--ptx_coef": 0.0,
        "--max_length": 2048,
        "--max_seq_len": 256,
        "--temperature": 1.0,
        "--top_k": 0,
        "--top_p": 1.0,
        "--gamma": 1.0,
        "--lam": 0.95,
        "--value_clip": 0.2,
        "--reward_clip": 5.0,
        "--reward_at": "last",
        "--skip_threshold": 20.0,
        "--reward_timeout": 60.0,
        "--sample_interval": 10,
        "--save_interval": 1000,
        "--kl_horizon": 10000,
        "--rollout_engine": "model",
        "--reward_normalization": "none",
        "--missing_eos_penalty": 0.0,
    },
    "grpo": {
        "--num_generations": 8,
        "--lr": 1e-6,
        "--kl_coef": 0.04,
        "--kl_in": "loss",
        "--algo": "grpo",
        "--top_k": 0,
        "--initial_temperature": 1.0,
        "--final_temperature": 0.9,
        "--reward_clip": 0.0,
        "--num_update_steps": 5,
    },
}


@pytest.fixture
def parse(data):
    """``parse(name, words)`` with the required flags given, a reward among them unless ``reward``
    is False."""

    def call(name, words=(), reward=True):
        given = ["--pretrain", "m", "--prompt_dataset", data["prompt_dataset"]]
        return PARSE[name]([*given, *(["--reward_functions", "length"] if reward else []), *words])

    return call


@pytest.mark.parametrize(
    "name, flag", [(name, flag) for name, flags in DEFAULTS.items() for flag in flags]
)
def test_defaults(name, flag):
    parser = getattr(rollouts, f"{name}_parser")()
    assert parser.get_default(parser.action_of(flag).dest) == DEFAULTS[name][flag]


@pytest.mark.parametrize("name, steps", [("ppo", 1), ("grpo", 2)])
def test_the_defaults_satisfy_the_buffer_equation(parse, name, steps):
    args = parse(name)
    generations = getattr(args, "num_generations", 1)
    sizes = (
        args.num_collect_steps,
        args.experience_batch_size,
        args.train_batch_size,
        args.accumulation_steps,
    )
    assert optimizer_steps_per_pass(*sizes, generations) == steps
    assert args.inference_batch_size == 16 * generations and args.logits_forward_batch_size == 16


def test_shared_code_finds_the_prompts(data):
    words = ["--pretrain", "m", "--reward_functions", "length", "--eval_prompt_dataset", __file__]
    given = ["--prompt_dataset", data["prompt_dataset"]]
    settings = rollouts.parse_ppo([*words, *given])
    assert settings.data.dataset == settings.flags["prompt_dataset"] == given[1:]
    assert settings.data.eval_dataset == [__file__]
    assert settings.schedule.max_steps is None and settings.parallel.batch_size == 16
    # they are no flags: not written to files
    assert not {"dataset", "eval_dataset", "batch_size"} & set(settings.flags)
    other = rollouts.parse_ppo([*words, "--dataset", __file__])
    assert other.flags["prompt_dataset"] == other.data.dataset == [__file__]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_written_arguments_are_read_back_alike(parse, tmp_path, name):
    words = [
        "--eval_prompt_dataset",
        __file__,
        "--num_episodes",
        "50",
        "--kl_target",
        "6",
        "--reward_weights",
        "-0.5",
    ]
    args = parse(
        name, [*words, "--clip_eps", "0.1", *(["--algo", "DAPO"] if name == "grpo" else [])]
    )
    assert args.eval_interval == 5
    file = tmp_path / "arguments.json"
    file.write_text(
        json.dumps({key: value for key, value in vars(args).items() if not key.startswith("_")})
    )
    again = PARSE[name](["--config", str(file)])
    assert {**vars(again), "config": None} == vars(args)


SCORED = ("--no_neural_reward_model", "--reward_functions", "length")
PASSES = ("--eval_ratio", "0.2", "--eval_pass_at", "1", "4")
REFUSED = [
    # policy losses
    (
        "grpo",
        ["--policy_loss", "cispo", "--clip_eps", "0.1"],
        "it is of ppo and gspo and gspo-token",
    ),
    ("ppo", ["--policy_loss", "gspo", "--dual_clip", "3"], "--dual_clip does nothing with"),
    (
        "ppo",
        ["--sapo_tau", "1", "1"],
        "--sapo_tau does nothing with --policy_loss ppo, it is of sapo",
    ),
    ("ppo", ["--cispo_cap", "5"], "--cispo_cap does nothing with --policy_loss ppo"),
    ("ppo", ["--dual_clip", "1"], "give more than 1, 3 is usual"),
    ("ppo", ["--dual_clip", "1.2"], "--dual_clip 1.2 lies inside of the clip range, up to 1.2"),
    ("grpo", ["--advantage", "gae"], "gae has a critic: use coati ppo"),
    # dynamic sampling, groups of rows
    ("grpo", ["--dynamic_sampling", "2", "--rollouts_ahead", "1"], "none can be asked for ahead"),
    (
        "grpo",
        ["--dynamic_sampling", "2", "--algo", "reinforce_pp"],
        "--algo reinforce_pp compares no groups",
    ),
    (
        "grpo",
        [*SCORED, "--dynamic_sampling", "2", "--reward_normalization", "running"],
        "leave --reward_normalization out",
    ),
    ("grpo", ["--offline_groups", "--environment", "calculator"], "would have nobody to answer"),
    ("grpo", ["--offline_groups", "--rollouts_ahead", "1"], "leave --rollouts_ahead 1 out"),
    # rewards by source, pass@k
    ("grpo", ["--reward_functions", "length", "--source_rewards", "math"], "expected SOURCE=NAME"),
    (
        "grpo",
        ["--reward_functions", "length", "--source_rewards", "math=judge"],
        "--judge_url is missing",
    ),
    ("grpo", [*SCORED, "--eval_right", "1"], "--eval_right does nothing without --eval_pass_at"),
    ("grpo", [*SCORED, "--eval_pass_at", "1"], "is estimated on evaluation prompts"),
    ("grpo", [*SCORED, *PASSES], "name the reward that a right one reaches in --eval_right"),
    (
        "grpo",
        [*SCORED, *PASSES, "--eval_right", "1", "--eval_generations", "3"],
        "--eval_pass_at 4 takes 4 responses or more to a prompt, --eval_generations is 3",
    ),
    # what is missing
    ("ppo", [], "nothing gives a reward"),
    ("grpo", ["--no_neural_reward_model"], "--no_neural_reward_model needs --reward_functions"),
    ("ppo", ["--reward_functions", "gsm"], "did you mean gsm8k?"),
    ("ppo", ["--reward_functions", "no.py:f"], "there is no file no.py"),
    (
        "ppo",
        ["--reward_functions", "length", "--reward_weights", "1", "2"],
        "--reward_weights has 2 values",
    ),
    ("ppo", ["--reward_functions", "length", "--reward_weights", "0"], "no function would count"),
    (
        "ppo",
        ["--reward_functions", "length", "--reward_weights", "much"],
        "--reward_weights: expected a number",
    ),
    (
        "ppo",
        ["--rm_pretrain", "m", "--reward_weights", "1"],
        "--reward_weights does nothing without",
    ),
    # reward model and critic
    (
        "ppo",
        ["--rm_checkpoint_path", "gone"],
        "--rm_checkpoint_path gone: there is no such directory",
    ),
    ("ppo", ["--rm_checkpoint_path", __file__], "is a file; expected the directory"),
    ("ppo", ["--rm_checkpoint_path", "$empty"], "holds no model"),
    (
        "ppo",
        ["--rm_checkpoint_path", "$bare"],
        "weights without a configuration: name their architecture with --rm_",
    ),
    (
        "ppo",
        ["--rm_checkpoint_path", "$rm", "--no_neural_reward_model", "--reward_functions", "length"],
        "--no_neural_reward_model says that there is none",
    ),
    (
        "ppo",
        [
            "--rm_pretrain",
            "r",
            "--no_neural_reward_model",
            "--reward_functions",
            "length",
            "--critic_pretrain",
            "c",
        ],
        "--rm_pretrain does nothing with --no_neural_reward_model",
    ),
    (
        "grpo",
        ["--rm_pretrain", "r", "--no_neural_reward_model", "--reward_functions", "length"],
        "--rm_pretrain does nothing with --no_neural_reward_model",
    ),
    (
        "ppo",
        ["--rm_pretrain", "r", "--critic_pretrain", "c", "--critic_checkpoint_path", "$rm"],
        "both bring the critic's weights",
    ),
    (
        "ppo",
        ["--rm_pretrain", "r", "--critic_checkpoint_path", "gone"],
        "--critic_checkpoint_path gone: there is no",
    ),
    ("grpo", ["--rm_pretrain", "r", "--critic_lr", "1e-5"], "unknown flag --critic_lr"),
    # sizes
    (
        "ppo",
        ["--accumulation_steps", "8"],
        "an episode collects --num_collect_steps 2 x --experience_",
    ),
    ("grpo", ["--train_batch_size", "7"], "x --num_generations 8 = 256"),
    ("ppo", ["--buffer_limit", "20"], "--buffer_limit 20: an episode collects 32 responses"),
    ("ppo", ["--buffer_limit", "64"], "keep a multiple of 32 that is at most 32"),
    (
        "ppo",
        ["--max_length", "256"],
        "--max_seq_len 256 for the response leaves 0 tokens for the prompt",
    ),
    ("grpo", ["--num_generations", "1"], "--algo grpo compares the responses to a prompt"),
    ("grpo", ["--algo", "ppo"], "invalid choice: 'ppo'"),
    ("grpo", ["--overlong_buffer_len", "64"], "--overlong_buffer_len belongs to --algo dapo"),
    (
        "grpo",
        ["--algo", "dapo", "--overlong_buffer_len", "300"],
        "--overlong_buffer_len 300 is more than a response may have",
    ),
    # SFT beside it
    ("ppo", ["--ptx_coef", "0.1"], "--ptx_coef 0.1 needs --ptx_dataset"),
    (
        "ppo",
        ["--ptx_coef", "1.5", "--ptx_dataset", __file__],
        "--ptx_coef: expected a number of at least 0",
    ),
    ("ppo", ["--disable_loss_mask"], "--disable_loss_mask is about SFT on --ptx_dataset"),
    (
        "ppo",
        ["--ptx_coef", "0.1", "--ptx_dataset", "gone"],
        "--ptx_dataset gone: there is no such file",
    ),
    (
        "ppo",
        [
            "--ptx_coef",
            "0.1",
            "--ptx_dataset",
            __file__,
            "--plugin",
            "gemini_auto",
            "--accumulation_steps",
            "1",
        ],
        "--plugin gemini_auto",
    ),
    # KL
    (
        "ppo",
        ["--kl_target", "6", "--kl_coef", "0"],
        "--kl_target multiplies --kl_coef toward it, which is 0",
    ),
    ("ppo", ["--kl_horizon", "500"], "--kl_horizon does nothing without --kl_target"),
    ("ppo", ["--kl_target", "6", "--kl_horizon", "6"], "take 640 or more"),
    ("ppo", ["--kl_in", "loss"], "--kl_in: invalid choice: 'loss'"),
    ("ppo", ["--temperature", "0"], "--temperature: expected a number above 0"),
    ("ppo", ["--top_p", "0"], "--top_p: expected a number above 0 and at most 1"),
    # evaluation
    (
        "ppo",
        ["--eval_interval", "5", "--prompt_dataset", __file__],
        "--eval_interval does nothing without",
    ),
    (
        "ppo",
        ["--metric_for_best", "reward", "--prompt_dataset", __file__],
        "--metric_for_best does nothing without",
    ),
    ("ppo", ["--eval_prompt_dataset", "gone"], "--eval_prompt_dataset gone: there is no such file"),
    ("ppo", ["--prompt_dataset", "gone"], "--prompt_dataset gone: there is no such file"),
    # plugins and machines
    ("ppo", ["--pp", "2"], "--pp 2: the model has to write responses"),
    ("ppo", ["--sp", "2"], "--sp 2: the model has to write responses"),
    (
        "grpo",
        ["--enable_sequence_parallelism"],
        "--enable_sequence_parallelism: the model has to write",
    ),
    (
        "ppo",
        ["--tp", "2", "--plugin", "gemini"],
        "the gradients of a critic's head come out wrong there",
    ),
    ("grpo", ["--tp", "2", "--zero_stage", "3", "--rm_pretrain", "r"], "models with a scalar head"),
    (
        "ppo",
        ["--lora_rank", "8", "--plugin", "gemini", "--mixed_precision", "bf16"],
        "cannot train LoRA",
    ),
    ("ppo", ["--lora_alpha", "8"], "--lora_alpha does nothing without LoRA"),
    ("ppo", ["--rollout_engine", "vllm"], "vllm is not installed"),
    (
        "ppo",
        ["--rollout_engine", "vllm", "--rollout_url", "http://a:1"],
        "--rollout_url names servers, --rollout_engine vllm samples in this process",
    ),
    ("ppo", ["--rollout_engine", "http"], "--rollout_engine http needs --rollout_url"),
    ("grpo", ["--rollout_sync", "disk"], "--rollout_sync does nothing without --rollout_url"),
    ("grpo", ["--rollout_timeout", "9"], "--rollout_timeout does nothing without --rollout_url"),
    ("grpo", ["--rollout_engine", "ray"], "--rollout_engine ray needs --rollout_workers"),
    ("grpo", ["--ray_address", "a:1"], "--ray_address does nothing without --rollout_workers"),
    (
        "ppo",
        ["--rm_pretrain", "r", "--rewards_on_ray"],
        "--rewards_on_ray does nothing without --reward_functions",
    ),
    ("ppo", ["--rollout_python", "py"], "--rollout_python does nothing without --rollout_workers"),
    (
        "grpo",
        ["--rollout_workers", "2", "--rollout_sync", "disk"],
        "--rollout_sync does nothing without --rollout_url",
    ),
    (
        "grpo",
        ["--rollout_workers", "2", "--rollout_url", "http://a:1"],
        "--rollout_url names servers, --rollout_workers asks a Ray cluster",
    ),
    (
        "grpo",
        ["--rollout_workers", "2", "--rollout_engine", "vllm"],
        "--rollout_engine vllm samples in this process; leave one of the two out",
    ),
    (
        "grpo",
        ["--rollout_workers", "2", "--ray_address", "ray://a:10001"],
        "--ray_address ray://a:10001: expected the head itself, HOST:6379",
    ),
    *[
        (
            "ppo",
            ["--rollout_workers", "2", "--ray_address", address],
            f"--ray_address {address}: expected auto, or the head",
        )
        for address in ("a", ":1", "a:0", "a:port", "a:65536")
    ],
    (
        "grpo",
        ["--rollout_url", "http://a:1", "--vllm_sleep"],
        "--vllm_sleep does nothing without --rollout_engine vllm",
    ),
    *[
        ("grpo", ["--rollout_url", url], f"--rollout_url {url}: expected the address of a server")
        for url in ("a:1", "http://a:1/v1", "ftp://a", "http://:1", "http://a:port")
    ],
    (
        "grpo",
        ["--rollout_url", "http://a:1", "http://b:1", "http://a:1/"],
        "--rollout_url http://a:1/ stands twice",
    ),
    (
        "grpo",
        ["--rollout_url", "http://a:1", "--rollout_token_env", "NOT_SET"],
        "--rollout_token_env NOT_SET: the variable is not set",
    ),
    ("ppo", ["--shared_base"], "--shared_base is for LoRA"),
    (
        "ppo",
        ["--shared_base", "--lora_rank", "8", "--plugin", "3d"],
        "--shared_base needs a plugin that",
    ),
    (
        "ppo",
        ["--shared_base", "--lora_rank", "8", "--lora_train_bias", "all"],
        "LoRA may not train biases",
    ),
    (
        "ppo",
        ["--shared_base", "--lora_rank", "8", "--offload_inference_models"],
        "the one base is never idle",
    ),
    (
        "ppo",
        ["--shared_base", "--lora_rank", "8", "--critic_pretrain", "c"],
        "--critic_pretrain with --shared_base",
    ),
    ("ppo", ["--max_steps", "3"], "--max_steps: it counts optimizer steps; --num_episodes counts"),
]


@pytest.mark.parametrize(
    "name, words, said", REFUSED, ids=[f"{n} {' '.join(w)[:60]}" for n, w, _ in REFUSED]
)
def test_what_cannot_work_is_refused_by_name(
    parse, refused, data, tmp_path, monkeypatch, name, words, said
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "pytorch_model-00001-of-00002.bin").write_text("")
    places = {"$rm": data["REWARD_MODEL_PATH"]} | {
        f"${name}": str(tmp_path / name) for name in ("empty", "bare")
    }
    words = [places.get(word, word) for word in words]
    if {"--tp", "--pp"} & set(words):
        monkeypatch.setenv("WORLD_SIZE", "2")
    rewarded = said.startswith("nothing") or any(
        word.startswith(("--rm", "--reward", "--no_n")) for word in words
    )
    err = refused(lambda more: parse(name, more, reward=not rewarded), words)
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words, settled",
    [
        ([], ("grpo", 0.2, 0.2, 0.2, 0, "k3")),
        (["--algo", "DAPO"], ("dapo", 0.2, 0.2, 0.28, 64, "k3")),
        (["--algo", "dapo", "--clip_eps", "0.1"], ("dapo", 0.1, 0.1, 0.1, 64, "k3")),
        (["--algo", "dapo", "--overlong_buffer_len", "0"], ("dapo", 0.2, 0.2, 0.28, 0, "k3")),
        (["--algo", "dapo", "--overlong_margin", "9"], ("dapo", 0.2, 0.2, 0.28, 9, "k3")),
        (["--clip_eps_low", "0.1", "--clip_eps_high", "0.3"], ("grpo", 0.2, 0.1, 0.3, 0, "k3")),
        (
            ["--algo", "REINFORCE_PPB", "--kl_in", "reward"],
            ("reinforce_pp_baseline", 0.2, 0.2, 0.2, 0, "k1"),
        ),
        (
            ["--algo", "REINFORCE++", "--num_generations", "1"],
            ("reinforce_pp", 0.2, 0.2, 0.2, 0, "k3"),
        ),
        (["--algo", "RLOO", "--kl_estimator", "k2"], ("rloo", 0.2, 0.2, 0.2, 0, "k2")),
    ],
)
def test_what_follows_the_algorithm(parse, words, settled):
    if "1" in words:
        words = [*words, "--accumulation_steps", "2"]
    args = parse("grpo", words)
    found = (
        args.algo,
        args.clip_eps,
        args.clip_eps_low,
        args.clip_eps_high,
        args.overlong_buffer_len,
        args.kl_estimator,
    )
    assert found == settled


@pytest.mark.parametrize(
    "words, settled",
    [
        (["--policy_loss", "gspo"], (3e-4, 3e-4, 4e-4)),
        (["--policy_loss", "gspo-token", "--clip_eps", "0.01"], (0.01, 0.01, 0.01)),
        (["--policy_loss", "gspo", "--algo", "dapo", "--clip_eps_high", "0.5"], (3e-4, 3e-4, 0.5)),
        (["--policy_loss", "cispo", "--cispo_cap", "4"], (None, None, None)),
        (["--policy_loss", "sapo"], (None, None, None)),
        (["--dual_clip", "3"], (0.2, 0.2, 0.2)),
    ],
)
def test_clip_ranges_are_those_of_the_policy_loss(parse, words, settled, tmp_path):
    args = parse("grpo", words)
    assert (args.clip_eps, args.clip_eps_low, args.clip_eps_high) == settled
    file = tmp_path / "arguments.json"  # as a run writes it
    given = {key: value for key, value in vars(args).items() if not key.startswith("_")}
    file.write_text(json.dumps(given))
    assert {**vars(PARSE["grpo"](["--config", str(file)])), "config": None} == vars(args)


@pytest.mark.parametrize("name", ["REINFORCE++-baseline", "reinforce_plus_plus_baseline"])
def test_advantages_have_the_names_of_other_libraries(parse, name):
    assert parse("grpo", ["--advantage", name]).algo == "reinforce_pp_baseline"
    assert parse("grpo", ["--advantage", "group"]).algo == "grpo"


def test_rewards_by_source_are_rewards(parse):
    words = ["--no_neural_reward_model", "--source_rewards", "math=gsm8k", "*=length", *PASSES]
    args = parse("grpo", words, reward=False)
    assert args.source_rewards == ["math=gsm8k", "*=length"] and args.eval_right is None
    assert parse("grpo", ["--offline_groups"], reward=False).offline_groups


def test_every_group_method_can_be_chosen(parse):
    assert {parse("grpo", ["--algo", name]).algo for name in GROUP_METHODS} == set(GROUP_METHODS)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--top_k", "50"], "--top_k 50: responses are sampled from another distribution"),
        (
            ["--top_p", "0.9", "--repetition_penalty", "1.1"],
            "--top_p 0.9, --repetition_penalty 1.1: responses",
        ),
        (["--ptx_dataset", __file__], "--ptx_dataset is not used, --ptx_coef being 0"),
    ],
)
def test_what_is_allowed_but_said(parse, capsys, words, said):
    parse("ppo", words)
    assert said in capsys.readouterr().err


def test_sampling_that_changes_the_distribution_is_fine_without_kl(parse, capsys):
    parse("ppo", ["--top_k", "50", "--kl_coef", "0"])
    assert capsys.readouterr().err == ""


def test_a_reward_model_and_functions_add_up(parse):
    args = parse(
        "ppo",
        [
            "--rm_pretrain",
            "r",
            "--reward_functions",
            "gsm8k_reward_fn",
            "length",
            "--reward_weights",
            "1",
            "-.5",
        ],
    )
    assert (args.rm_pretrain, args.reward_functions, args.reward_weights) == (
        "r",
        ["gsm8k", "length"],
        [1.0, -0.5],
    )


def test_rm_pretrain_without_reward_model_is_the_critics_start(parse):
    assert parse("ppo", ["--rm_pretrain", "r", "--no_neural_reward_model"]).rm_pretrain == "r"


@pytest.mark.parametrize("place", [".", "modeling", "critic/modeling"])
def test_where_a_critic_may_lie(parse, tmp_path, place):
    (tmp_path / "run" / place).mkdir(parents=True)
    (tmp_path / "run" / place / "adapter_config.json").write_text("{}")
    assert parse("ppo", ["--critic_checkpoint_path", str(tmp_path / "run")]).critic_checkpoint_path


def words_of(command, data):
    words = command.words(data)
    script = [position for position, word in enumerate(words) if word.endswith(".py")]
    return words[script[0] + 1 :] if script else words


@pytest.mark.parametrize(
    "command",
    [*documented_commands("ppo"), *documented_commands("ppo_flags")],
    ids=lambda command: command.source,
)
def test_documented_ppo_parses(command, data, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(command.processes) if "--nproc" in command.text else "1")
    args = parse_ppo(words_of(command, data))
    assert args.rm_checkpoint_path == data["REWARD_MODEL_PATH"] and args.ptx_dataset == [
        data["ptx_dataset"]
    ]
    assert (args.num_episodes, args.num_update_steps, args.ptx_batch_size) == (2000, 1, 1)
    assert capsys.readouterr().err.count("coati: ") == 1  # --ptx_dataset is not used


def test_documented_train_prompts_parses(data, monkeypatch, capsys, refused):
    bare, short, long = sorted(
        documented_commands("prompts"), key=lambda command: len(command.text)
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    data = data | {"REWARD_MODEL_PATH": data["REWARD_MODEL_PATH"] + ".pt"}
    args = parse_prompts(words_of(long, data))
    assert (args.plugin, args.max_samples, args.num_update_steps, args.ptx_coef) == (
        "zero2",
        100,
        1,
        0.9,
    )
    assert (
        args.rm_checkpoint_path == data["REWARD_MODEL_PATH"].removesuffix(".pt")
        and args.rm_pretrain
    )
    said = capsys.readouterr().err
    for part in (
        "--model bloom has no effect",
        "--rm_path is now --rm_checkpoint_path",
        "--ptx_coef is 0.9",
        "--max_datasets_size is now --max_samples",
        "--max_epochs is now --num_update_steps 1",
        "not a .pt file",
        "--strategy colossalai_zero2 is now --plugin zero2",
    ):
        assert said.count(part) == 1, part
    assert parse_prompts(words_of(short, data)).prompt_dataset == [data["RAW_DATASET"]]
    err = refused(parse_prompts, words_of(bare, data))
    assert "prompts.csv is read as --prompt_dataset" in err and "--pretrain is missing" in err


@pytest.mark.parametrize(
    "name, words, values, said",
    [
        (
            "ppo",
            ["--rm_model", "bloom"],
            {},
            "--rm_model bloom has no effect: the architecture is read from --rm_",
        ),
        ("ppo", ["--need_optim_ckpt", "True"], {}, "--need_optim_ckpt True has no effect"),
        (
            "grpo",
            ["--max_tokens_thinking", "2000"],
            {},
            "--max_tokens_thinking 2000 has no effect: --max_seq_len",
        ),
        (
            "prompts",
            ["--max_timesteps", "20"],
            {"num_episodes": 2, "num_collect_steps": 10, "accumulation_steps": 2},
            "are now --num_collect_steps 10 --num_episodes 2: an episode collects once",
        ),
        (
            "prompts",
            ["--update_timesteps", "2", "--num_episodes", "3"],
            {"num_episodes": 15, "num_collect_steps": 2},
            "--max_timesteps 10 and --update_timesteps 2 are now",
        ),
        (
            "prompts",
            ["--max_input_len", "96", "--max_seq_len", "128"],
            {"max_length": 224},
            "--max_length 224",
        ),
        (
            "ppo",
            ["--prompt_path", __file__],
            {"prompt_dataset": [__file__]},
            "--prompt_path is now --prompt_dataset",
        ),
    ],
)
def test_older_flags(parse, capsys, name, words, values, said):
    args = parse(name, words)
    assert {key: getattr(args, key) for key in values} == values
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_file_of_weights_is_refused_with_what_to_do(parse, refused, tmp_path):
    (tmp_path / "rm.pt").write_text("")
    err = refused(
        lambda words: parse("ppo", words, reward=False), ["--rm_path", str(tmp_path / "rm.pt")]
    )
    assert "is a file of the first generation" in err and "train_rm.py" in err


def test_flags_of_rollouts_are_not_taken_elsewhere(refused):
    from tests.cli.flat import parse_sft

    for flag in (*DROPPED_OF_ROLLOUTS, "--rm_path", "--max_timesteps"):
        assert f"unknown flag {flag}" in refused(parse_sft, [flag, "1"])


def test_help_offers_only_what_works():
    for name in ("ppo", "grpo"):
        text = getattr(rollouts, f"{name}_parser")().format_help()
        assert "--pp N" not in text and "--sp_mode" not in text and "--max_timesteps" not in text
        assert "episodes between checkpoints" in text and "DIR/actor/modeling" in text


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


def test_servers_are_an_engine_of_their_own(parse, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "word")
    urls = ["http://a:9001", "https://b", "http://[::1]:2"]
    found = parse("grpo", ["--rollout_url", *urls, "--rollout_token_env", "A_TOKEN"])
    assert found.rollout_engine == "http" and found.rollout_url == urls
    assert (found.rollout_sync, found.rollout_timeout) == ("http", 600.0)
    assert parse("grpo").rollout_engine == "model"


def test_a_ray_cluster_is_an_engine_of_its_own(parse):
    words = ["--rollout_workers", "3", "--ray_address", "[::1]:6379", "--rollout_timeout", "9"]
    found = parse("grpo", [*words, "--rollout_worker_gpus", "0.5"])
    assert (found.rollout_engine, found.rollout_workers, found.rollout_timeout) == ("ray", 3, 9.0)
    assert (found.rollout_worker_cpus, found.rollout_worker_gpus) == (1.0, 0.5)
    assert parse("ppo", ["--rollout_workers", "1"]).ray_address == "auto"


@pytest.mark.parametrize(
    ("release", "said"),
    [(None, "Ray is not installed"), ("2.59.1", "Ray 2.59.1 is installed"), ("2.61.0", ">=2.60")],
)
def test_no_ray_or_another_is_one_message(parse, monkeypatch, capsys, release, said):
    from importlib.metadata import PackageNotFoundError

    def version(name):
        if release is None:
            raise PackageNotFoundError(name)
        return release

    monkeypatch.setattr("coati.utils.ray_cluster.version", version)
    with pytest.raises(SystemExit):
        parse("grpo", ["--rollout_workers", "2"])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "--rollout_workers" in one]
    assert said in line and "pip install 'coati[ray]'" in line


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_importance_weights(parse, name, capsys):
    found = parse(name)
    assert (found.rollouts_ahead, found.rollout_is) == (0, "token")
    assert found.rollout_is_cap is None and found.rollout_is_mask is None
    words = ["--rollouts_ahead", "2", "--rollout_is", "sequence", "--rollout_is_cap", "4"]
    found = parse(name, [*words, "--rollout_is_mask", "0.5", "5"])
    assert (found.rollout_is_cap, found.rollout_is_mask) == (4.0, [0.5, 5.0])
    assert "no effect" not in capsys.readouterr().err
    parse(name, ["--rollout_is_cap", "4"])
    assert "--rollout_is_cap has no effect: without --rollouts_ahead" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--rollouts_ahead", "-1"), "--rollouts_ahead: expected a whole number of at least 0"),
        (("--rollout_is", "word"), "--rollout_is"),
        (("--rollout_is_cap", "0.5"), "--rollout_is_cap 0.5: weights are 1 on average"),
        (("--rollout_is_mask", "1.5", "2"), "--rollout_is_mask 1.5 2: expected LOW below 1"),
        (("--rollout_is_mask", "2"), "--rollout_is_mask"),
        (
            ("--rollout_is", "none", "--rollout_is_cap", "2"),
            "--rollout_is_cap does nothing with --rollout_is none",
        ),
        (
            ("--rollout_is", "none", "--rollout_is_mask", "0.5", "2"),
            "--rollout_is_mask does nothing with --rollout_is none",
        ),
    ],
)
def test_importance_weights_that_are_none(parse, capsys, words, said):
    with pytest.raises(SystemExit):
        parse("grpo", list(words))
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_pair_of_bounds_in_a_file(parse, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("rollouts_ahead: 1\nrollout_is_mask: [0.5, 4]\n")
    words = ["--config", str(file)]
    assert parse("grpo", words).rollout_is_mask == [0.5, 4.0]
    schema = schema_of(rollouts.grpo_parser())
    jsonschema.validate({"rollout_is_mask": [0.5, 4]}, schema)
    for wrong, said in ((2, "found 1"), ([0.5, 2, 3], "found 3")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"rollout_is_mask": wrong}, schema)
        file.write_text(f"rollout_is_mask: {wrong}\n")
        with pytest.raises(SystemExit):
            parse("grpo", words)
        assert f"run.yaml:1: 'rollout_is_mask' takes 2 values, {said}" in capsys.readouterr().err
