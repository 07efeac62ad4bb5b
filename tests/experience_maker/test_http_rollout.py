"""Rollouts by servers: what the library's own sampler answers over HTTP is what sampling in this
process gives, whatever becomes of the servers meanwhile."""

import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.rollouts import server_worker
from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.experience_maker.rollouts.rollout_client import RolloutServer, Row, Wanted
from coati.experience_maker.rollouts.row_queue import RowQueue
from coati.experience_maker.rollouts.weight_versions import Weights
from coati.models.generation.loop import Sampling, generate
from coati.models.generation.row_noise import NoiseRows, row_noise
from coati.utils.errors import RunFailed
from tests.experience_maker.rollout_servers import FakeEngine, answering, http_rollout, serving
from tests.tiny import tiny_llama

PROMPTS = torch.tensor([[2, 2, 5, 17], [9, 11, 42, 7], [2, 8, 8, 3], [2, 2, 2, 6]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
NOISE = NoiseRows(seed=5, episode=3, rows=[4, 9, 2, 7])
STOPS = [[30], [7, 8]]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Servers that are out are looked for often."""
    monkeypatch.setattr(server_worker, "SHORTEST_WAIT_S", 0.02)
    monkeypatch.setattr(server_worker, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr("coati.experience_maker.rollouts.remote_rollout.LOOK_S", 0.05)


def in_process(model, temperature=0.8, noise=NOISE, count=6, **sampling):
    return generate(
        model,
        PROMPTS,
        MASK,
        noise=row_noise(noise.seed, noise.episode, noise.rows, count),
        temperature=temperature,
        return_logprobs=True,
        stop_sequences=STOPS,
        max_new_tokens=count,
        pad_token_id=0,
        **sampling,
    )


def same(found, expected, version):
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.stopped.tolist() == expected.stopped.tolist()
    assert_close(found.sampled_logprobs, expected.logprobs, rtol=0, atol=1e-6)
    assert found.logprobs is None and found.version == version


def ask(rollout, temperature=0.8, noise=NOISE):
    return rollout.ask(PROMPTS, MASK, noise=noise, temperature=temperature)


@pytest.mark.parametrize("sync", ["http", "disk", "nccl", "ipc"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_servers_give_the_tokens_and_log_probs_of_this_process(tmp_path, sync, count):
    policy = tiny_llama(seed=1)
    starts = [tiny_llama(seed=0) for _ in range(count)]
    with serving(*starts) as servers:
        rollout = http_rollout(
            FakeEngine(policy), [server.url for server in servers], tmp_path, sync=sync
        )
        rollout.publish(7, policy.state_dict().items())
        same(ask(rollout).result(), in_process(policy), 7)
        assert {server.sampler.loaded.partition("-")[0] for server in servers} == {"7"}
        assert sum(worker.rows for worker in rollout.workers) == 4
        rollout.close()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    "sampling", [{"top_k": 5}, {"top_p": 0.6}, {"repetition_penalty": 1.7}, {"do_sample": False}]
)
def test_every_way_of_sampling_is_the_same_there(tmp_path, sampling):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(
            FakeEngine(policy), [server.url], tmp_path, sampling=Sampling(**sampling)
        )
        rollout.publish(0, policy.state_dict().items())
        expected = in_process(policy, 1.0 if "do_sample" in sampling else 0.8, **sampling)
        found = ask(rollout, 1.0 if "do_sample" in sampling else 0.8).result()
        same(found, expected, 0)
        rollout.close()


@pytest.mark.parametrize("count", [1, 2])
def test_limits_of_rows_and_later_turns_are_those_of_this_process(tmp_path, count):
    policy = tiny_llama(seed=1)
    limits = [1, 6, 3, 2]
    noise = replace(NOISE, turn=2)
    expected = generate(
        policy,
        PROMPTS,
        MASK,
        noise=noise.noise(6),
        temperature=0.8,
        return_logprobs=True,
        stop_sequences=STOPS,
        max_new_tokens=6,
        limits=limits,
        pad_token_id=0,
    )
    with serving(*(tiny_llama() for _ in range(count))) as servers:
        rollout = http_rollout(FakeEngine(policy), [server.url for server in servers], tmp_path)
        rollout.publish(7, policy.state_dict().items())
        found = rollout.ask(PROMPTS, MASK, noise=noise, temperature=0.8, limits=limits).result()
        same(found, expected, 7)
        assert (found.lengths <= torch.tensor(limits)).all() and int(found.lengths.max()) > 2
        first = ask(rollout).result()
        assert found.responses()[1][:3] != first.responses()[1][:3]  # another turn, other noise
        rollout.close()


def test_vllm_is_told_the_limit_and_the_seed_of_each_row(monkeypatch):
    server = RolloutServer("http://127.0.0.1:1")
    bodies = []

    def call(verb, route, body):
        bodies.append(body)
        choice = {"token_ids": [5] * body["max_tokens"], "logprobs": {}}
        choice["logprobs"]["token_logprobs"] = [-1.0] * body["max_tokens"]
        return {"choices": [choice]}

    monkeypatch.setattr(server, "_call", call)
    wanted = Wanted(Sampling(), ((30,),))
    for turn, limit in ((0, 4), (1, 2)):
        (answer,) = server.complete([Row([3, 4], limit, 5, 3, 9, turn)], wanted, "7-a")
        assert answer.tokens == [5] * limit and not answer.stopped
    assert [body["max_tokens"] for body in bodies] == [4, 2]
    expected = [int(row_noise(5, 3, [9], 1, turn)[0, 0] * 2**31) for turn in (0, 1)]
    assert [body["seed"] for body in bodies] == expected and expected[0] != expected[1]
    assert not any("coati" in body for body in bodies)


def test_what_was_asked_before_a_publish_is_of_the_weights_of_then(tmp_path):
    old = tiny_llama(seed=1)
    new = tiny_llama(seed=2)
    with serving(tiny_llama(), tiny_llama()) as servers:
        engine = FakeEngine(old)
        rollout = http_rollout(engine, [server.url for server in servers], tmp_path)
        rollout.publish(1, old.state_dict().items())
        hold = [server.server.gate for server in servers]
        for gate in hold:  # nothing is answered before the second publish
            gate.pause()
        before = ask(rollout)
        rollout.publish(2, new.state_dict().items())
        after = ask(rollout, noise=NoiseRows(5, 4, [0, 1, 2, 3]))
        kept = sorted(folder.name.partition("-")[0] for folder in (tmp_path / "weights").iterdir())
        for gate in hold:
            gate.resume()
        same(before.result(), in_process(old), 1)
        same(after.result(), in_process(new, noise=NoiseRows(5, 4, [0, 1, 2, 3])), 2)
        assert "1" in kept
        left = wait_for(lambda: [f.name for f in (tmp_path / "weights").iterdir()], 1)
        assert [name.partition("-")[0] for name in left] == ["2"]
        rollout.close()


def wait_for(look, count, seconds=5.0):
    """What ``look`` gives once it has ``count`` entries."""
    end = time.monotonic() + seconds
    while len(found := look()) != count and time.monotonic() < end:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_dies_in_mid_answer_loses_nothing_and_is_taken_back(
    tmp_path, count, monkeypatch, capfd
):
    policy = tiny_llama(seed=1)
    with serving(*[tiny_llama() for _ in range(count)]) as servers:
        rollout = http_rollout(FakeEngine(policy), [s.url for s in servers], tmp_path)
        rollout.publish(3, policy.state_dict().items())
        reached = threading.Event()
        first = servers[0].sampler
        complete = first.complete

        def slowly(body):
            reached.set()
            time.sleep(0.5)
            return complete(body)

        monkeypatch.setattr(first, "complete", slowly)
        asked = ask(rollout)
        assert reached.wait(5)
        servers[0].stop()
        if count == 2:
            same(asked.result(), in_process(policy), 3)  # by the other
            servers[0].start()
        else:
            servers[0].start()
            same(asked.result(), in_process(policy), 3)
        assert servers[0].sampler is not first
        back = wait_for(lambda: [1] * servers[0].sampler.loaded.startswith("3-"), 1)
        assert back, "it is brought to the weights that are asked for"
        same(ask(rollout).result(), in_process(policy), 3)
        rollout.close()
    assert "rollout server left out" in capfd.readouterr().err


def test_a_slow_server_gets_fewer_rows(tmp_path, monkeypatch):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama(), tiny_llama()) as servers:
        rollout = http_rollout(FakeEngine(policy), [s.url for s in servers], tmp_path)
        rollout.publish(0, policy.state_dict().items())
        complete = servers[0].sampler.complete
        monkeypatch.setattr(
            servers[0].sampler, "complete", lambda body: time.sleep(1.0) or complete(body)
        )
        expected = in_process(policy)
        answers = [ask(rollout) for _ in range(4)]
        for answer in answers:
            same(answer.result(), expected, 0)
        slow, quick = (worker.rows for worker in rollout.workers)
        assert slow + quick == 16 and quick > slow
        rollout.close()


def test_with_no_server_left_the_run_is_told_and_does_not_hang(tmp_path):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama(), tiny_llama()) as servers:
        urls = [server.url for server in servers]
        rollout = http_rollout(FakeEngine(policy), urls, tmp_path, timeout=0.4)
        rollout.publish(0, policy.state_dict().items())
        for server in servers:
            server.stop()
        with pytest.raises(RolloutsLost) as found:
            ask(rollout).result()
        text = str(found.value)
        assert "no rollout server has worked for 0.4 s (--rollout_timeout)" in text
        assert all(f"{url}: nothing answers" in text for url in urls)
        rollout.close()


def test_a_server_that_another_run_has_given_other_weights_is_brought_back(tmp_path):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path)
        rollout.publish(4, policy.state_dict().items())
        server.sampler.model.load_state_dict(tiny_llama(seed=9).state_dict())
        server.sampler.loaded = "4-otherweights"  # the same version, other bytes
        same(ask(rollout).result(), in_process(policy), 4)
        rollout.close()


def test_half_an_update_is_not_sampled_with(tmp_path):
    """A file that lost its end, and one of whose tensors was changed."""
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path, sync="disk", timeout=0.4)
        rollout.publish(0, policy.state_dict().items())
        store = rollout.store
        put = store.put

        def damaged(version, tensors):
            weights = put(version, tensors)
            file = next(weights.published().folder.glob("*.safetensors"))
            data = bytearray(file.read_bytes())
            if version == 1:
                file.write_bytes(data[:-100])
            else:
                data[-1] ^= 1
                file.write_bytes(data)
            return weights

        store.put = damaged
        rollout.publish(1, tiny_llama(seed=2).state_dict().items())
        with pytest.raises(RolloutsLost, match="bytes of .* arrived"):
            ask(rollout).result()
        assert server.sampler.loaded.startswith("0-"), "what it had before stays"
        rollout.close()
        again = http_rollout(FakeEngine(policy), [server.url], tmp_path, sync="disk", timeout=0.4)
        again.publish(0, policy.state_dict().items())
        again.store.put, put = damaged, again.store.put
        again.publish(2, tiny_llama(seed=2).state_dict().items())
        with pytest.raises(RolloutsLost, match="is not what was published"):
            ask(again).result()
        again.close()


def test_weights_that_cannot_be_written_end_the_run_with_the_reason(tmp_path):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path, sync="disk")
        rollout.publish(0, policy.state_dict().items())
        wait_for(lambda: list((tmp_path / "weights").iterdir()), 1)
        shutil.rmtree(tmp_path / "weights")
        (tmp_path / "weights").write_text("a file in its place")
        rollout.publish(1, tiny_llama(seed=2).state_dict().items())
        with pytest.raises(RunFailed, match="weights of step 1 cannot be published"):
            ask(rollout).result()
        rollout.close()


def test_an_error_that_nobody_expected_ends_the_run_and_not_a_thread_alone(tmp_path, monkeypatch):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path)
        rollout.publish(0, policy.state_dict().items())

        def broken(*_):
            raise RuntimeError("CUDA out of memory")

        monkeypatch.setattr(rollout.store, "offered", broken)
        rollout.publish(1, tiny_llama(seed=2).state_dict().items())
        with pytest.raises(RolloutsLost, match="RuntimeError: CUDA out of memory"):
            ask(rollout).result()
        rollout.close()


def test_weights_that_a_server_is_being_brought_to_are_in_use():
    queue = RowQueue()
    first, second = Weights(1, Future()), Weights(2, Future())
    queue.announce(first)
    assert queue.next_weights(None, 0) is first
    queue.announce(second)
    assert set(queue.in_use()) == {first, second}
    queue.let_go()
    assert queue.in_use() == [second]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5)])
def test_whether_there_are_log_probs_is_one_answer_for_all_servers(tmp_path, sampling):
    """Of two servers one filters before it takes log-probs, as vLLM does."""
    policy = tiny_llama(seed=1)
    with serving(tiny_llama(), tiny_llama()) as servers:
        urls = [server.url for server in servers]
        kinds = {servers[0].url: True, servers[1].url: False}
        own = property(lambda self: kinds[self.url])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RolloutServer, "is_own", own)
            rollout = http_rollout(FakeEngine(policy), urls, tmp_path, sampling=sampling)
        whole = sampling == Sampling()
        assert rollout.gives_logprobs == whole
        rollout.publish(0, policy.state_dict().items())
        assert (ask(rollout).result().sampled_logprobs is not None) == whole
        rollout.close()


def test_a_server_that_refuses_a_request_ends_the_run_at_once(tmp_path, monkeypatch):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path)
        rollout.publish(0, policy.state_dict().items())
        monkeypatch.setattr(server.sampler, "max_length", 9)
        with pytest.raises(RunFailed, match="status 400 a prompt of 4 tokens and 6 new ones"):
            ask(rollout).result()
        rollout.close()


def test_rows_that_nobody_waits_for_are_dropped(tmp_path):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path)
        rollout.publish(0, policy.state_dict().items())
        server.server.gate.pause()
        first = ask(rollout)
        dropped = ask(rollout, noise=NoiseRows(5, 8, [0, 1, 2, 3]))
        assert dropped.cancel() and dropped.cancelled()
        server.server.gate.resume()
        same(first.result(), in_process(policy), 0)
        same(ask(rollout).result(), in_process(policy), 0)
        assert sum(worker.rows for worker in rollout.workers) == 8
        rollout.close()


# What is found out before the first episode


def refusal(engine, url, folder, **options) -> str:
    with pytest.raises((ValueError, RunFailed)) as found:
        rollout = http_rollout(engine, [url], folder, **options)
        try:
            rollout.publish(0, engine.module.state_dict().items())
        finally:
            rollout.close()
    text = str(found.value)
    assert text.startswith(f"--rollout_url {url}") and "\n" not in text
    return text


def test_nobody_there_is_said(tmp_path):
    assert "nothing answers (" in refusal(FakeEngine(tiny_llama()), "http://127.0.0.1:9", tmp_path)


def test_another_model_is_named_by_what_differs(tmp_path):
    with serving(tiny_llama(hidden=32, vocab_size=500)) as [server]:
        text = refusal(FakeEngine(tiny_llama()), server.url, tmp_path)
    assert (
        "serves another model (tiny): vocab_size 500 there, 384 here; hidden_size 32 there" in text
    )


def test_a_model_of_the_same_sizes_and_other_tensors_is_named(tmp_path):
    """Facts are equal; the published weights do not fit."""
    with serving(tiny_llama()) as [server]:
        text = refusal(FakeEngine(tiny_llama(attention_bias=True)), server.url, tmp_path)
    assert "q_proj.bias" in text or "lack" in text


def test_less_room_than_the_run_needs_is_named(tmp_path):
    with serving(tiny_llama(), max_length=12) as [server]:
        text = refusal(FakeEngine(tiny_llama()), server.url, tmp_path)
    assert "takes 12 tokens of prompt and response, --max_length is 16" in text


def test_a_token_is_asked_for_by_name(tmp_path):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama(), token="word") as [server]:
        assert "wants a token" in refusal(FakeEngine(policy), server.url, tmp_path)
        assert "--rollout_token_env" in refusal(
            FakeEngine(policy), server.url, tmp_path, token="another"
        )
        rollout = http_rollout(FakeEngine(policy), [server.url], tmp_path, token="word")
        rollout.publish(0, policy.state_dict().items())
        same(ask(rollout).result(), in_process(policy), 0)
        rollout.close()


READY = {"/health": b"", "/v1/models": {"data": [{"id": "m"}]}}
TOLD = {"weight_version": "0-no"}


def described(**more):
    facts = facts_of(tiny_llama().config)
    return {"results": [{"engine": "vllm", "facts": facts, "dtype": "float32", **more}]}


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"/health": 503}, "/health: status 503"),
        ({"/health": b"<html>hello"}, "answers no JSON but '<html>hello'"),
        (READY, "has no development routes .*VLLM_SERVER_DEV_MODE=1"),
        ({**READY, "/weight_info": TOLD}, "does not know describe_model .*worker-extension-cls"),
        (
            {
                **READY,
                "/weight_info": TOLD,
                "/collective_rpc": described(logprobs_mode="raw_logprobs"),
            },
            "gives raw_logprobs, which leave the temperature out",
        ),
        (
            {
                **READY,
                "/weight_info": TOLD,
                "/collective_rpc": described(logprobs_mode="processed_logprobs"),
                "/pause": {},
            },
            "has loaded weights None, not 0-",
        ),
    ],
)
def test_what_is_not_a_rollout_server_is_refused_by_what_it_lacks(tmp_path, says, message):
    with answering(says) as url:
        text = refusal(FakeEngine(tiny_llama()), url, tmp_path, temperatures=(0.9, 1.0))
    import re

    assert re.search(message, text), text


def test_a_version_that_does_not_arrive_is_named(tmp_path, monkeypatch):
    """The server takes the weights and goes on to say that it has others."""
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        load = server.sampler.load_published

        def forgets(place):
            found = load(place)
            server.sampler.loaded = "start"
            return found

        monkeypatch.setattr(server.sampler, "load_published", forgets)
        assert "weights start are loaded, not 0-" in refusal(
            FakeEngine(policy), server.url, tmp_path
        )


def test_other_bytes_than_were_published_are_found_at_the_first_publish(tmp_path, monkeypatch):
    policy = tiny_llama(seed=1)
    with serving(tiny_llama()) as [server]:
        load = server.sampler.load_published

        def spoils(place):
            found = load(place)
            with torch.no_grad():
                server.sampler.model.model.norm.weight[3] += 1e-3
            return found

        monkeypatch.setattr(server.sampler, "load_published", spoils)
        text = refusal(FakeEngine(policy), server.url, tmp_path)
    assert "holds another model.norm.weight than was published" in text
