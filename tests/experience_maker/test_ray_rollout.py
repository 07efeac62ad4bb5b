"""Rollouts by Ray's actors: what they answer is what sampling in this process gives, whatever
becomes of them meanwhile. tests/end_to_end/test_ray.py runs a cluster."""

import sys
import threading
from collections import deque

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("ray", reason="Ray is not installed")

from coati.experience_maker.rollouts import ray_rollout
from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.experience_maker.rollouts.ray_actor import arrays_of, tensors_of
from coati.experience_maker.rollouts.ray_rollout import RayOptions, RayRollout
from coati.models.generation.loop import Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.utils.errors import RunFailed
from tests.experience_maker.fake_ray import FakeRay, plainly
from tests.experience_maker.rollout_servers import FakeEngine
from tests.experience_maker.test_http_rollout import (
    MASK,
    PROMPTS,
    STOPS,
    ask,
    in_process,
    quick,  # noqa: F401
    same,
    wait_for,
)
from tests.tiny import tiny_llama


@pytest.fixture
def ray(monkeypatch):
    found = FakeRay()
    monkeypatch.setattr(ray_rollout, "connect", lambda address: found)
    monkeypatch.setattr(ray_rollout, "disconnect", lambda address: None)
    monkeypatch.setitem(sys.modules, "ray", found)  # as actors import it
    yield found
    found.end_calls()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(seed=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rollout(ray, model):
    """``rollout(policy, workers, more...)``, closed at the end."""
    made = []

    def rollout(policy, workers: int = 2, sampling: Sampling | None = None, **more) -> RayRollout:
        options = {"facts": facts_of(policy.config), "max_length": 16, "timeout": 20.0, **more}
        options = {"precision": "fp32", "model_path": model, **options}
        made.append(
            RayRollout(
                FakeEngine(policy),
                RayOptions(workers, **options),
                sampling=sampling or Sampling(),
                stop_sequences=STOPS,
                max_new_tokens=6,
                pad_token_id=0,
            )
        )
        return made[-1]

    yield rollout
    for one in made:
        one.close()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_tokens_and_log_probs_of_this_process(ray, rollout, workers):
    policy = tiny_llama(seed=1)
    engine = rollout(policy, workers)
    engine.publish(7, policy.state_dict().items())
    same(ask(engine).result(), in_process(policy), 7)
    assert ray.puts == 1  # however many actors read it
    assert sum(worker.rows for worker in engine.workers) == 4
    assert [one.options["max_restarts"] for one in ray.made] == [-1] * workers


@pytest.mark.parametrize(
    "sampling", [{"top_k": 5}, {"top_p": 0.6}, {"repetition_penalty": 1.7}, {"do_sample": False}]
)
def test_every_way_of_sampling_is_the_same_there(rollout, sampling):
    policy = tiny_llama(seed=1)
    engine = rollout(policy, sampling=Sampling(**sampling))
    engine.publish(0, policy.state_dict().items())
    temperature = 1.0 if "do_sample" in sampling else 0.8
    same(ask(engine, temperature).result(), in_process(policy, temperature, **sampling), 0)


def test_what_was_asked_before_a_publish_is_of_the_weights_of_then(ray, rollout):
    """And these stay in the object store until the last of it is in, no longer."""
    old = tiny_llama(seed=1)
    new = tiny_llama(seed=2)
    later = NoiseRows(5, 4, [0, 1, 2, 3])
    engine = rollout(old)
    engine.publish(1, old.state_dict().items())
    (first,) = engine.queue.in_use()
    hold = threading.Event()
    ray.faults["complete"] = deque([hold.wait, hold.wait])
    before = ask(engine)
    engine.publish(2, new.state_dict().items())
    after = ask(engine, noise=later)
    engine.store.keep_only(engine.queue.in_use)
    second = engine._newest.published()  # written behind that
    assert len(first.published().refs) == len(second.refs) == 1
    hold.set()
    same(before.result(), in_process(old), 1)
    same(after.result(), in_process(new, noise=later), 2)
    assert wait_for(lambda: first.published().refs, 0) == []
    assert len(second.refs) == 1


def gone():
    from ray.exceptions import ActorUnavailableError

    return ActorUnavailableError("socket closed", None)


def given_up():
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def lost():
    from ray.exceptions import ObjectLostError

    return ObjectLostError("00", None, "")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", [gone, given_up, lost])
@pytest.mark.parametrize("method", ["complete", "take"])
def test_an_actor_that_ends_loses_nothing_and_works_again(
    ray, rollout, workers, fault, method, capfd
):
    policy = tiny_llama(seed=1)
    new = tiny_llama(seed=2)
    engine = rollout(policy, workers)
    engine.publish(3, policy.state_dict().items())
    ray.faults[method] = deque([fault()])
    same(ask(engine).result(), in_process(policy), 3)
    engine.publish(4, new.state_dict().items())
    for _ in range(200):
        same(ask(engine).result(), in_process(new), 4)
        if all(worker.out_since is None for worker in engine.workers):
            break
    said = capfd.readouterr().err
    assert (
        said.count("rollout worker left out") == 1
        and "rollout worker 0 is back" in said
        or ("rollout worker 1 is back" in said)
    )
    anew = fault is given_up
    assert len(ray.made) == workers + anew


def test_an_actor_started_by_ray_again_has_the_weights_that_a_call_names(ray, rollout):
    """Nobody told it of any before: it keeps nothing that its first process was told."""
    policy = tiny_llama(seed=1)
    engine = rollout(policy, 1)
    engine.publish(3, policy.state_dict().items())
    made = ray.made[0].actor
    made._object = made._new()
    same(ask(engine).result(), in_process(policy), 3)


def test_rows_of_a_worker_that_was_lost_are_sampled_in_the_same_batches(ray, rollout):
    """Five rows over two actors are three and two; the two are given back first."""
    policy = tiny_llama(seed=1)
    engine = rollout(policy, 2)
    engine.publish(3, policy.state_dict().items())
    seen = []
    complete = ray_rollout.RayWorker._choices

    def recording(self, body):
        seen.append(tuple(body["coati"]["noise"]["rows"]))
        return complete(self, body)

    ray.faults["complete"] = deque([gone(), gone(), gone()])
    prompts = torch.cat([PROMPTS, PROMPTS[:1]])
    mask = torch.cat([MASK, MASK[:1]])
    noise = NoiseRows(5, 3, [4, 9, 2, 7, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_rollout.RayWorker, "_choices", recording)
        engine.ask(prompts, mask, noise=noise, temperature=0.8).result()
    assert set(seen) == {(4, 9, 2), (7, 1)} and len(seen) == 5


def test_with_no_worker_left_the_run_is_told_why(ray, rollout):
    policy = tiny_llama(seed=1)
    engine = rollout(policy, 2, timeout=0.5)
    engine.publish(3, policy.state_dict().items())
    ray.faults = {name: deque(gone() for _ in range(999)) for name in ("complete", "describe")}
    with pytest.raises(RolloutsLost, match=r"no rollout worker has worked for 0.5 s .*worker 0: "):
        ask(engine).result()


def test_a_call_that_takes_too_long_goes_to_the_others(ray, rollout, capfd):
    policy = tiny_llama(seed=1)
    engine = rollout(policy, 2, timeout=0.5)
    engine.publish(3, policy.state_dict().items())
    stuck = threading.Event()
    ray.faults["complete"] = deque([stuck.wait])
    same(ask(engine).result(), in_process(policy), 3)
    assert "no answer within 0.5 s (--rollout_timeout)" in capfd.readouterr().err
    stuck.set()


def test_a_store_that_is_full_ends_the_run(ray, rollout):
    from ray.exceptions import ObjectStoreFullError

    policy = tiny_llama(seed=1)
    engine = rollout(policy, 1)
    ray.faults["put"] = deque([ObjectStoreFullError("full")])
    with pytest.raises(RunFailed, match=r"--rollout_workers .*object store cannot take them: full"):
        engine.publish(3, policy.state_dict().items())


def test_what_is_asked_after_a_failure_fails_at_once(ray, rollout):
    policy = tiny_llama(seed=1)
    engine = rollout(policy, 1)
    engine.publish(3, policy.state_dict().items())
    engine.queue.fail("nobody is left")
    for _ in range(2):
        with pytest.raises(RunFailed, match="nobody is left"):
            ask(engine).result()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"workers": 5}, r"5: 4 have room on the 1 hosts of the cluster \(4 CPUs in all\)"),
        ({"cpus": 3.0}, r"2: 1 have room on the 1 hosts"),
        ({"workers": 4, "spare": 1.0}, r"4: they leave 0 CPUs .* --rewards_on_ray, which need 1"),
        ({"gpus": 0.5}, r"2: 0 have room .*--rollout_worker_gpus 0.5"),
        ({"facts": {"vocab_size": 7}}, r"worker 0 \(host .*another model.*vocab_size 384 there, 7"),
        ({"model_path": "nowhere"}, "worker 0: .*nowhere"),
    ],
)
def test_a_run_is_refused_for_workers_that_cannot_serve_it(rollout, more, said):
    with pytest.raises(ValueError, match=f"--rollout_workers {said}") as refused:
        rollout(tiny_llama(), **more)
    assert "\n" not in str(refused.value)


def test_a_worker_of_other_code_is_refused_whatever_its_commit(monkeypatch, rollout):
    monkeypatch.setattr(ray_rollout, "code_version", lambda: "0.0.9, commit ab+, code 123")
    with pytest.raises(ValueError, match=r"worker 0 \(host .*\) has coati .*install the same"):
        rollout(tiny_llama())
    assert ray_rollout._code("0.1, commit ab+, code 12") == ray_rollout._code("0.1, code 12")
    assert ray_rollout._code("0.1, code 12") != ray_rollout._code("0.1, code 13")
    assert ray_rollout._code("0.1, code 12") != ray_rollout._code("0.2, code 12")


def test_the_actors_of_a_run_end_with_it(ray, rollout):
    engine = rollout(tiny_llama(), 2)
    engine.close()
    assert ray.killed == [one.actor for one in ray.made]


def test_after_the_end_of_a_run_no_actor_is_asked_anything(ray, rollout, capfd):
    """Neither for weights that were just announced nor for a worker that failed: what Ray is asked
    after it was left starts a cluster."""
    policy = tiny_llama(seed=1)
    engine = rollout(policy, 2)
    engine.publish(3, policy.state_dict().items())
    ray.faults = {name: deque(gone() for _ in range(99)) for name in ("complete", "describe")}
    ask(engine)
    wait_for(lambda: [one for one in engine.workers if one.out_since is not None], 2)
    engine.publish(4, policy.state_dict().items())
    capfd.readouterr()
    engine.close()
    assert not any(worker.is_alive() for worker in engine.workers)
    assert engine.queue.next_weights(None, 60.0) is None
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_weights_travel_as_plain_arrays_to_the_bit(dtype):
    tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(4, 3).to(dtype).T}
    found = tensors_of(plainly(arrays_of(tensors)))
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert_close(found[name], tensor, rtol=0, atol=0)
