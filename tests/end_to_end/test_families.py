"""Every family of docs/models.md by the scripts: fine-tuned, then PPO with a critic of its own, and
what was saved loads in plain transformers."""

from pathlib import Path

import pytest
import torch

from tests.distributed.spawn import run
from tests.end_to_end.inputs import metrics, write_family
from tests.end_to_end.online_inputs import metrics as online_metrics
from tests.end_to_end.worker import Run
from tests.models_table.families import FAMILIES, known

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
NAMES = [family.type for family in FAMILIES if known(family) and not family.remote]
# Their caches are classes of their own, so that they can be trained but not sampled from. (The
# critic's loader does not get that far with DeepSeek-V4: AutoModel does not find its last norm.)
UNSAMPLED = {"minimax": "cache class of its own", "deepseek_v4": "norm.weight"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {name: write_family(folder / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def ended(models, data, online_words, tmp_path_factory):
    """(folder of the runs, {"script family": Ended}), all in one process."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for name, model in models.items():
        sft = folder / f"sft {name}"
        words = ["--pretrain", model, "--dataset", data["train"], "--max_length", "96"]
        words += ["--plugin", "zero2", "--mixed_precision", "fp32", "--batch_size", "2"]
        words += ["--max_steps", "2", "--log_interval", "1", "--lr", "1e-3"]
        runs[f"sft {name}"] = Run([*words, "--save_dir", str(sft)])
        ppo = online_words("ppo", folder / f"ppo {name}", "--num_episodes", "1")
        start = ["--pretrain", str(sft / "modeling"), "--rm_pretrain", model]  # of the critic
        judged = ["--reward_functions", "length", "--no_neural_reward_model"]
        runs[f"ppo {name}"] = Run([*ppo, *start, *judged], script="train_ppo.py")
    return folder, run(1, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=550)[0]


@pytest.mark.parametrize("name", NAMES)
def test_trains_by_the_scripts(ended, name):
    from transformers import AutoModelForCausalLM

    folder, runs = ended
    sampled = name not in UNSAMPLED
    if not sampled:
        assert UNSAMPLED[name] in runs[f"ppo {name}"].err
    for script in ("sft", "ppo") if sampled else ("sft",):
        assert runs[f"{script} {name}"].code == 0, runs[f"{script} {name}"].err
    lines = metrics(folder / f"sft {name}")
    lines += online_metrics(folder / f"ppo {name}") if sampled else []
    values = [value for line in lines for value in line.values()]
    assert values and all(torch.tensor(value).isfinite() for value in values)
    for place in ("modeling", "actor/modeling") if sampled else ("modeling",):
        (modeling,) = Path(folder).glob(f"* {name}/{place}")
        model, report = AutoModelForCausalLM.from_pretrained(modeling, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model(input_ids=torch.tensor([[5, 9, 17]])).logits.isfinite().all()
