import pytest

from tests.end_to_end.inputs import prepare, short_lines, write_model
from tests.end_to_end.online_inputs import MAX_LENGTH, NEW, prompts, write_files, write_reward_model

ROWS = {
    "train": (0, 48),
    "eval": (60, 6),
}  # first line and number of lines; some are longer than a row may be


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """{"train": 31 rows, "eval": some}, prepared."""
    folder = tmp_path_factory.mktemp("data")
    return {name: prepare(folder / name, short_lines(*rows)) for name, rows in ROWS.items()}


@pytest.fixture(scope="session")
def online_places(tmp_path_factory, model) -> dict[str, str]:
    """What a run is given, by name."""
    folder = tmp_path_factory.mktemp("online")
    return write_files(folder) | {
        "model": model,
        "prompts": prompts(folder / "prompts"),
        "eval": prompts(folder / "eval", 5, first=24),
        "ptx": prepare(folder / "ptx", short_lines(0, 40), MAX_LENGTH),
        "untrue": prepare(folder / "untrue", short_lines(0, 24), MAX_LENGTH, "prompt"),
        "rm": write_reward_model(folder / "rm"),
    }


@pytest.fixture(scope="session")
def online_words(online_places):
    """``online_words(script, save_dir, more...)``: two episodes in fp32; later words override
    earlier ones, "$name" stands for a place."""
    own = {
        "ppo": ["--rm_pretrain", "$rm", "--critic_lr", "1e-2", "--num_collect_steps", "2"],
        "grpo": [
            "--reward_functions",
            f"{online_places['functions']}:vowels",
            "--num_generations",
            "4",
            "--num_collect_steps",
            "1",
            "--experience_batch_size",
            "2",
        ],
        "online_dpo": [
            "--reward_functions",
            f"{online_places['functions']}:vowels",
            "--num_collect_steps",
            "2",
        ],
    }

    def words(script: str, save_dir, *more: str) -> list[str]:
        given = [
            "--pretrain",
            "$model",
            "--prompt_dataset",
            "$prompts",
            "--conversation_template_config",
            "$template",
            "--plugin",
            "zero2",
            "--mixed_precision",
            "fp32",
            *([] if script == "online_dpo" else ["--kl_coef", "0.05"]),
            "--lr",
            "5e-3",
            "--warmup_steps",
            "0",
            "--max_length",
            str(MAX_LENGTH),
            "--max_seq_len",
            str(NEW),
            "--num_episodes",
            "2",
            "--experience_batch_size",
            "4",
            "--num_update_steps",
            "2",
            "--train_batch_size",
            "2",
            "--accumulation_steps",
            "2",
            "--sample_interval",
            "0",
            "--save_dir",
            str(save_dir),
            *own[script],
            *more,
        ]
        return [online_places[word[1:]] if word.startswith("$") else word for word in given]

    return words
