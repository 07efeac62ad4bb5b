"""PPO and GRPO by their scripts: however the models are laid over processes, the same samples,
scores and losses."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run
from tests.end_to_end.inputs import write_family
from tests.end_to_end.online_inputs import metrics, of_episode, write_reward_model
from tests.end_to_end.worker import Run

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
FIRST = (
    "reward",
    "reward_std",
    "policy_loss",
    "value_loss",
    "approx_kl",
    "response_length",
    "stop_rate",
    "sampled_entropy",
)
LORA = ("--lora_rank", "4")


@dataclass(frozen=True)
class Group:
    """``words`` of a plugin; ``exact``: fp32; ``tp``: processes that share weights, so that one
    holds all prompts; ``family`` of the models where they are no Llamas."""

    words: tuple[str, ...]
    exact: bool = True
    tp: int = 1
    scripts: tuple[str, ...] = ("ppo", "grpo")
    family: str | None = None


BF16 = ("--mixed_precision", "bf16")
GROUPS = {
    "zero2": Group(("--plugin", "zero2")),
    "ddp": Group(("--plugin", "ddp")),
    "zero2_cpu": Group(("--plugin", "zero2_cpu")),
    "3d": Group(("--plugin", "3d")),
    "3d tp": Group(("--plugin", "3d", "--tp", "2"), tp=2),
    "3d zero 1": Group(("--plugin", "3d", "--zero_stage", "1", *BF16), exact=False),
    "3d zero 2": Group(("--plugin", "3d", "--zero_stage", "2", *BF16), exact=False),
    "zero2 bf16": Group(("--plugin", "zero2", *BF16), exact=False),
    "gemini": Group(("--plugin", "gemini", *BF16), exact=False),
    "gemini_auto": Group(
        ("--plugin", "gemini_auto", *BF16, "--accumulation_steps", "1"), exact=False
    ),
    "ddp lora": Group(("--plugin", "ddp", *LORA)),
    "zero2 lora": Group(("--plugin", "zero2", *LORA)),
    "zero2_cpu lora": Group(("--plugin", "zero2_cpu", *LORA)),
    "one base": Group(
        (
            "--plugin",
            "zero2",
            *LORA,
            "--shared_base",
            "--reward_functions",
            "length",
            "--no_neural_reward_model",
        ),
        scripts=("ppo",),
    ),
}
FAMILIES = ("qwen3", "gemma3_text", "gpt_oss") if transformers_major() >= 5 else ()
for _family in FAMILIES:
    GROUPS[f"3d tp {_family}"] = Group(
        GROUPS["3d tp"].words, tp=2, scripts=("ppo",), family=_family
    )


def shares(script: str, count: int) -> list[str]:
    """The words that cut one process's episode for ``count`` data-parallel ones."""
    if script == "ppo":
        return ["--experience_batch_size", str(4 // count), "--accumulation_steps", str(2 // count)]
    return ["--experience_batch_size", str(2 // count), "--accumulation_steps", str(2 // count)]


def launched(nproc: int, cases: dict[str, list[str]], timeout: float = 200) -> dict[str, list]:
    """name "script ..." -> its ranks' ends."""
    runs = {name: Run(words, script=f"train_{name.split()[0]}.py") for name, words in cases.items()}
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=timeout)
    for name in cases:
        assert [rank[name].code for rank in ranks] == [0] * nproc, (
            f"{name}: {[rank[name].err for rank in ranks]}"
        )
    return {name: [rank[name] for rank in ranks] for name in cases}


@pytest.fixture(scope="module")
def models(online_places, tmp_path_factory) -> dict[str | None, tuple[str, ...]]:
    """{family: the words that name its policy and reward model}; None: those of online_words."""
    folder, found = tmp_path_factory.mktemp("families"), {None: ()}
    for family in FAMILIES:
        policy = write_family(folder / family, family)
        judge = write_reward_model(folder / f"{family} rm", family=family)
        found[family] = ("--pretrain", policy, "--rm_pretrain", judge)
    return found


@pytest.fixture(scope="module")
def alone(online_words, models, tmp_path_factory):
    """{kind of run: its directory} of one process: both scripts, with and without adapters."""
    folder, cases = tmp_path_factory.mktemp("alone"), {}
    for script in ("ppo", "grpo"):
        cases[script] = online_words(script, folder / script)
        cases[f"{script} lora"] = online_words(script, folder / f"{script} lora", *LORA)
    base = GROUPS["one base"].words
    cases["ppo one base"] = online_words("ppo", folder / "ppo one base", "--rm_pretrain", "", *base)
    cases["ppo one base"] = without(cases["ppo one base"], "--rm_pretrain", "--shared_base")
    for family in FAMILIES:
        name = f"ppo {family}"
        cases[name] = online_words("ppo", folder / name, *models[family])
    launched(1, cases)
    return {name: folder / name for name in cases}


def without(words: list[str], *flags: str) -> list[str]:
    """The words without these flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in flags
        if not dropping:
            kept.append(word)
    return kept


def loaded(save_dir: Path) -> None:
    """Every model that was left behind loads, and says something finite."""
    from coati.models import Critic, load_scalar_model
    from coati.models.loading import adapter_base, load_causal_lm

    ids = torch.tensor([[5, 9, 17, 30]])
    with torch.no_grad():
        assert (
            load_causal_lm(str(save_dir / "actor" / "modeling"), dtype="fp32")(input_ids=ids)
            .logits.isfinite()
            .all()
        )
        folder = save_dir / "critic" / "modeling"
        if folder.is_dir():
            critic = load_scalar_model(Critic, str(folder), dtype="fp32")
            assert critic.score.weight.any() and critic(ids, torch.ones_like(ids)).isfinite().all()
        if adapter_base(str(save_dir / "actor" / "modeling")) is None:
            from transformers import AutoModelForCausalLM

            plain = AutoModelForCausalLM.from_pretrained(save_dir / "actor" / "modeling")
            assert plain(input_ids=ids).logits.isfinite().all()


def reference_of(group: str, script: str) -> str:
    if group == "one base":
        return "ppo one base"
    if GROUPS[group].family:
        return f"{script} {GROUPS[group].family}"
    return f"{script} lora" if group.endswith("lora") else script


@pytest.mark.parametrize("name", GROUPS)
def test_two_processes_do_as_one(name, alone, models, online_words, online_places, tmp_path):
    group, cases = GROUPS[name], {}
    for script in group.scripts:
        cut = shares(script, 2 // group.tp)
        given = online_words(script, tmp_path / script, *cut, *group.words, *models[group.family])
        cases[script] = without(given, "--rm_pretrain") if name == "one base" else given
    ended = launched(2, cases)
    start = Path(models[group.family][1] if group.family else online_places["model"])
    for script in group.scripts:
        reference, place = alone[reference_of(name, script)], tmp_path / script
        expected, found = metrics(reference), metrics(place)
        assert_same_first_episode(of_episode(found, 1), of_episode(expected, 1), group.exact)
        assert all(torch.tensor(v).isfinite() for line in found for v in line.values()), found
        if group.exact and "gemini" not in name:
            assert_same_weights(place, reference, start)
        loaded(place)
        assert "the trained" in ended[script][0].err


def assert_same_first_episode(
    found: dict[str, float], expected: dict[str, float], exact: bool
) -> None:
    names = [name for name in FIRST if name in expected]
    assert len(names) >= 7
    if not exact:  # other roundings are other samples, sooner or later
        assert abs(found["reward"] - expected["reward"]) < max(2 * expected["reward_std"], 0.1)
        assert abs(found["approx_kl"]) < 1
        return
    for name in names:
        assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-5, msg=f"{name}: {found}, {expected}"
        )


def assert_same_weights(place: Path, reference: Path, start: Path, rel: float = 3.2e-3) -> None:
    """What training has changed is the same to a few thousandths: Adam makes steps of numbers that
    are all but 0."""
    from safetensors.torch import load_file

    for file in sorted(reference.glob("*/modeling/*.safetensors")):
        mine, other = load_file(place / file.relative_to(reference)), load_file(file)
        before = load_file(start / file.name) if (start / file.name).exists() else {}
        assert mine.keys() == other.keys()
        moved = sum(
            float((other[name] - before.get(name, 0)).double().square().sum()) for name in other
        )
        apart = sum(float((other[name] - mine[name]).double().square().sum()) for name in other)
        assert 0 < moved and apart < rel**2 * moved, f"{file}: {apart**0.5} of {moved**0.5}"
