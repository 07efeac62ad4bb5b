"""PPO and GRPO on rollout servers: what they train is what they train on their own samples, however
many servers and processes there are, and whichever of them are killed."""

from pathlib import Path

import pytest

from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.online_inputs import metrics, of_episode, weights
from tests.end_to_end.test_online_plugins import (
    assert_same_first_episode,
    assert_same_weights,
    launched,
    shares,
)
from tests.end_to_end.worker import Fault, Run
from tests.experience_maker.rollout_servers import serving

CPU = {"CUDA_VISIBLE_DEVICES": ""}
TP = ("--plugin", "3d", "--tp", "2")


@pytest.fixture(scope="module")
def servers(online_places):
    from coati.models.loading import load_causal_lm

    model = load_causal_lm(online_places["model"], dtype="fp32")
    with serving(model, model) as started:
        yield started


@pytest.fixture(scope="module")
def alone(online_words, tmp_path_factory):
    """{script: the directory of a run that sampled by itself, in one process}."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {script: online_words(script, folder / script) for script in ("ppo", "grpo")}
    launched(1, cases)
    return {script: folder / script for script in cases}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("nproc", "tp", "words"),
    [
        (1, 1, ()),
        (2, 1, ("--rollout_sync", "disk")),
        (2, 2, TP),
    ],
    ids=["one process", "two processes", "tensor parallelism"],
)
def test_a_run_on_servers_is_one_in_the_process(
    nproc, tp, words, servers, alone, online_words, online_places, tmp_path
):
    urls = [server.url for server in servers[: 1 if nproc == 1 else 2]]
    cases = {}
    for script in alone:
        cut = shares(script, nproc // tp)
        cases[script] = online_words(
            script, tmp_path / script, *cut, *words, "--rollout_url", *urls
        )
    before = [server.sampler.loaded for server in servers]
    launched(nproc, cases)
    for script in cases:
        expected = metrics(alone[script])
        found = metrics(tmp_path / script)
        assert_same_first_episode(of_episode(found, 1), of_episode(expected, 1), True)
        assert_same_weights(tmp_path / script, alone[script], Path(online_places["model"]))
        assert not list(tmp_path.rglob("weights-*.safetensors")), "published weights are removed"
    changed = [
        server.sampler.loaded != loaded for server, loaded in zip(servers, before, strict=True)
    ]
    assert changed[: len(urls)] == [True] * len(urls)


@pytest.mark.matrix
def test_a_killed_trainer_goes_on_with_the_same_servers_to_the_bit(servers, online_words, tmp_path):
    urls = [server.url for server in servers]
    every = ("--num_episodes", "3", "--save_interval", "1", "--rollout_url", *urls)
    cut = shares("grpo", 2)

    def words(name: str, *more: str) -> list[str]:
        return online_words("grpo", tmp_path / name, *cut, *every, *more)

    launched(2, {"grpo whole": words("whole")})
    fault = Fault("update", 2, "after", rank=1)
    killed = Run(words("killed"), fault, script="train_grpo.py")
    with pytest.raises(WorkerFailed):
        run(2, "tests.end_to_end.worker:train", killed, env=CPU, timeout=100)
    changed = ("--rollout_url", urls[1], "--rollout_sync", "disk", "--rollout_timeout", "99")
    changed += ("--rollout_weights_dir", str(tmp_path / "published"))
    launched(2, {"grpo again": words("killed", "--checkpoint_path", "auto", *changed)})
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not list((tmp_path / "published").iterdir())


@pytest.mark.matrix
def test_ahead_on_servers_is_ahead_in_the_process(servers, online_words, online_places, tmp_path):
    """The same responses of the same older weights, with the same importance weights."""
    urls = [server.url for server in servers]
    ahead = ("--num_episodes", "3", "--rollouts_ahead", "1")
    cases = {}
    for script in ("ppo", "grpo"):
        for where, more in {"alone": (), "served": ("--rollout_url", *urls)}.items():
            place = tmp_path / f"{script}-{where}"
            cases[f"{script} {where}"] = online_words(script, place, *ahead, *more)
    launched(1, cases)
    for script in ("ppo", "grpo"):
        alone = tmp_path / f"{script}-alone"
        served = tmp_path / f"{script}-served"
        for episode in (2, 3):
            expected = of_episode(metrics(alone), episode)
            found = of_episode(metrics(served), episode)
            assert found["staleness"] == expected["staleness"] == 4
            for name in ("staleness_gap", "rollout_is_ess", "approx_kl", "reward"):
                assert found[name] == pytest.approx(expected[name], rel=1e-3), name
        assert_same_weights(served, alone, Path(online_places["model"]))


@pytest.mark.matrix
def test_a_killed_trainer_has_what_it_had_asked_for_ahead(servers, online_words, tmp_path):
    urls = [server.url for server in servers]
    every = ("--num_episodes", "3", "--save_interval", "1", "--rollout_url", *urls)
    cut = shares("grpo", 2)

    def words(name: str, *more: str) -> list[str]:
        given = (*cut, *every, "--rollouts_ahead", "1", *more)
        return online_words("grpo", tmp_path / name, *given)

    launched(2, {"grpo whole": words("whole")})
    fault = Fault("update", 2, "after", rank=1)
    killed = Run(words("killed"), fault, script="train_grpo.py")
    with pytest.raises(WorkerFailed):
        run(2, "tests.end_to_end.worker:train", killed, env=CPU, timeout=100)
    launched(2, {"grpo again": words("killed", "--checkpoint_path", "auto")})
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
