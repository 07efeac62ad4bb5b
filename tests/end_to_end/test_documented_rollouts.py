"""The command lines of the older documents for PPO train an episode and leave models that load.

Paths are those of tiny models and a few rows, processes as many as --tp splits a model over, else
two; the runs are cut to one episode of short responses. Everything else is as printed.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.documented import documented_commands
from tests.distributed.spawn import run
from tests.end_to_end.inputs import prepare, short_lines, write_model
from tests.end_to_end.worker import Ended, Run

pytestmark = pytest.mark.matrix

COMMANDS = {
    f"{number:02d} {command.stage} {command.source}": command
    for number, command in enumerate(
        command
        for stage in ("ppo", "prompts")
        for command in documented_commands(stage)
        if "--pretrain" in command.text
    )
}
SHORTER = ["--num_episodes", "1", "--max_seq_len", "4"]


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """What the documents' variables stand for, apart from the directory of a run."""
    from safetensors.torch import save_file

    from coati.models import RewardModel

    folder = tmp_path_factory.mktemp("documented")
    model = write_model(folder / "model", num_key_value_heads=4, max_position_embeddings=2048)
    torch.manual_seed(0)
    reward = RewardModel(model)
    (folder / "rm" / "modeling").mkdir(parents=True)
    save_file(
        {name: t.contiguous() for name, t in reward.state_dict().items()},
        folder / "rm" / "modeling" / "model.safetensors",
    )
    reward.config.save_pretrained(folder / "rm" / "modeling")
    rows = [json.loads(line)["messages"] for line in short_lines(0, 80).splitlines()]
    raw = [
        {"instruction": row[0]["content"], "input": "", "output": row[1]["content"]} for row in rows
    ]
    (folder / "raw.json").write_text(json.dumps(raw), encoding="utf-8")
    return {
        "PRETRAINED_MODEL_PATH": model,
        "PRETRAINED_TOKENIZER_PATH": model,
        "SFT_MODEL_PATH": model,
        "REWARD_MODEL_PATH": str(folder / "rm"),
        "prompt_dataset": prepare(
            folder / "prompts", short_lines(0, 80), max_length=512, type="prompt"
        ),
        "ptx_dataset": prepare(folder / "ptx", short_lines(0, 60), max_length=512),
        "RAW_DATASET": str(folder / "raw.json"),
    }


def _without_place(flags: list[str]) -> list[str]:
    """Without ``--save_path``, the older name of ``--save_dir``: two names of one flag are
    refused."""
    at = flags.index("--save_path") if "--save_path" in flags else len(flags)
    return flags[:at] + flags[at + 2 :]


@pytest.fixture(scope="module")
def ended(variables, tmp_path_factory) -> dict[str, tuple[Path, list[Ended]]]:
    """name -> where it ran and how its ranks ended."""
    folder = tmp_path_factory.mktemp("commands")
    groups: dict[tuple[str, int], dict[str, Run]] = {}
    for name, command in COMMANDS.items():
        # What train_reward_model.py was told to write was a file then.
        rm = variables["REWARD_MODEL_PATH"] + (".pt" if command.stage == "prompts" else "")
        words = command.words(variables | {"REWARD_MODEL_PATH": rm, "SAVE_DIR": "elsewhere"})
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        flags = [*_without_place(words[at + 1 :]), *SHORTER, "--save_dir", str(folder / name[:2])]
        plugin = flags[1 + flags.index("--plugin" if "--plugin" in flags else "--strategy")]
        processes = 4 if "--tp" in flags else 2
        groups.setdefault((plugin, processes), {})[name] = Run(flags, script=Path(words[at]).name)
    env = {
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    found = {}
    for (_, processes), runs in groups.items():
        ranks = run(processes, "tests.end_to_end.worker:train_each", runs, env=env, timeout=400)
        found |= {name: (folder / name[:2], [rank[name] for rank in ranks]) for name in runs}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_trains_an_episode_and_leaves_models(ended, name):
    from coati.models import Critic, load_scalar_model
    from coati.models.loading import load_causal_lm
    from coati.models.tokenizer import load_tokenizer

    place, ranks = ended[name]
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks[0].err
    model = load_causal_lm(place / "actor" / "modeling", dtype="fp32").eval()
    critic = load_scalar_model(Critic, place / "critic" / "modeling", dtype="fp32").eval()
    batch = load_tokenizer(place / "actor" / "modeling")("Hello", return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
        assert critic(batch["input_ids"], batch["attention_mask"]).isfinite().all()
    arguments = json.loads((place / "arguments.json").read_text())
    if COMMANDS[name].stage == "prompts":
        assert "train_prompts.py is now train_ppo.py" in ranks[0].err
        assert arguments["ptx_coef"] == 0.9 and arguments["plugin"] == "zero2"
        # Also in the second run, which finds what the first has prepared.
        assert "prompts ended with a response, which was left out" in ranks[0].err
    else:
        assert arguments["plugin"] == "3d" and arguments["tp"] == 4
        assert "--ptx_dataset is not used" in ranks[0].err
