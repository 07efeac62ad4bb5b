"""The routes of the library's own rollout server, as vLLM has them, and the files that weights
travel in."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from safetensors import SafetensorError
from torch.testing import assert_close

from coati.experience_maker.rollouts.own_sampler import OwnSampler
from coati.experience_maker.rollouts.weight_files import (
    Place,
    digest,
    read_index,
    read_weights,
    write_weights,
)
from coati.experience_maker.rollouts.weight_server import WeightServer
from coati.parallel.weights import checkpoint_weights
from coati.utils.transformers_compat import transformers_major
from tests.end_to_end.inputs import of_family
from tests.experience_maker.rollout_servers import FakeEngine, serving
from tests.tiny import tiny_llama


@pytest.fixture
def server():
    with serving(tiny_llama()) as [started]:
        yield started


def call(server, route, body=None, token=None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(server.url + route, data, headers), timeout=10
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def completion(**more):
    return {
        "model": "tiny",
        "prompt": [[5, 17, 33, 9], [9, 11]],
        "max_tokens": 5,
        "temperature": 1.0,
        "seed": 3,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        **more,
    }


def test_a_plain_request_is_answered_as_vllm_answers_it(server):
    status, found = call(server, "/v1/completions", completion())
    assert status == 200 and [choice["index"] for choice in found["choices"]] == [0, 1]
    model = server.sampler.model
    for prompt, choice in zip([[5, 17, 33, 9], [9, 11]], found["choices"], strict=True):
        ids = choice["token_ids"]
        assert len(ids) == 5 and choice["finish_reason"] == "length"
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps = logits.float().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert_close(torch.tensor(choice["logprobs"]["token_logprobs"]), logps, rtol=0, atol=1e-5)
    assert call(server, "/v1/completions", completion()) == (200, found)  # the seed repeats it
    other = call(server, "/v1/completions", completion(seed=4))[1]["choices"]
    assert [c["token_ids"] for c in other] != [c["token_ids"] for c in found["choices"]]


def test_stop_tokens_end_a_response_and_belong_to_it(server):
    ids = call(server, "/v1/completions", completion())[1]["choices"][0]["token_ids"]
    found = call(server, "/v1/completions", completion(stop_token_ids=[ids[2]]))[1]["choices"][0]
    assert found["token_ids"] == ids[: ids.index(ids[2]) + 1] and found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "hello"}, "expected token ids"),
        ({"prompt": []}, "expected token ids"),
        ({"prompt": [[]]}, "expected token ids"),
        ({"prompt": [[5], [5, 999]]}, "prompt 1 has the token id 999; .* has 384"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number of at least 1, found 0"),
        ({"max_tokens": 600}, "a prompt of 4 tokens and 600 new ones are more than the 512"),
        ({"coati": {"max_tokens": [3]}}, "max_tokens: expected 2 numbers, one for each prompt"),
        ({"coati": {"max_tokens": [3, 0]}}, "max_tokens: .* at least 1, found 0"),
        ({"coati": {"max_tokens": [3, 511]}}, "a prompt of 2 tokens and 511 new ones are more"),
        ({"top_p": 2.0}, "top_p must be above 0"),
        ({"coati": {"noise": {"wrong": 1}}}, "wrong"),
    ],
)
def test_malformed_requests_are_named(server, body, message):
    import re

    status, found = call(server, "/v1/completions", completion(**body))
    assert status == 400 and re.search(message, found["error"]["message"])


def test_weights_that_are_not_loaded_are_a_conflict(server):
    own = {"coati": {"weights": "7-abc"}}
    status, found = call(server, "/v1/completions", completion(**own))
    assert (status, found["error"]["message"]) == (409, "weights start are loaded, not 7-abc")
    status, _ = call(server, "/update_weight_version", {"new_version": "7-abc"})
    assert status == 409
    assert call(server, "/weight_info") == (200, {"weight_version": "start"})


def test_only_the_named_methods_are_run(server):
    for method in ("complete", "__class__", "save", None):
        status, found = call(server, "/collective_rpc", {"method": method, "args": []})
        assert status == 400 and "describe_model, load_published" in found["error"]["message"]
    assert call(server, "/collective_rpc", {"method": "describe_model"})[0] == 200
    assert call(server, "/nothing", {})[0] == 404
    assert call(server, "/v1/completions", [1])[0] == 400


def test_all_routes_but_health_need_the_token():
    with serving(tiny_llama(), token="word") as [server]:
        assert call(server, "/health")[0] == 200
        for route, body in (("/weight_info", None), ("/pause", {}), ("/v1/completions", {})):
            assert call(server, route, body)[0] == 401
            assert call(server, route, body, "other")[0] == 401
        assert call(server, "/weight_info", token="word")[0] == 200


def test_a_pause_waits_for_those_inside_and_lets_nobody_in(server, monkeypatch):
    complete = server.sampler.complete
    order = []

    def slowly(body):
        order.append("begun")
        time.sleep(0.3)
        order.append("answered")
        return complete(body)

    monkeypatch.setattr(server.sampler, "complete", slowly)
    first = threading.Thread(target=call, args=(server, "/v1/completions", completion()))
    first.start()
    while not order:
        time.sleep(0.01)
    assert call(server, "/pause?mode=wait", {})[0] == 200
    assert order == ["begun", "answered"]
    assert call(server, "/is_paused") == (200, {"is_paused": True})
    second = threading.Thread(target=call, args=(server, "/v1/completions", completion()))
    second.start()
    time.sleep(0.1)
    assert order == ["begun", "answered"]
    call(server, "/resume", {})
    second.join(5)
    assert order == ["begun", "answered"] * 2


# Published weights


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox", "llama tied"])
def test_weights_of_every_kind_arrive_as_they_are(tmp_path, family, monkeypatch):
    """Experts that files hold one by one, another layout of names, and a tied head; in place, and
    by loading where the tensors of files are no parts of the model's."""

    def made(seed):
        if family == "llama tied":
            return tiny_llama(seed=seed, tie=True)
        model = of_family(family)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.05)
        return model

    policy = made(1)
    tensors = checkpoint_weights(FakeEngine(policy), dict(policy.state_dict()))
    published = write_weights(tmp_path, 4, tensors)
    for by_loading in (False, True):
        sampler = OwnSampler(made(2))
        if by_loading:
            monkeypatch.setattr(sampler, "_targets", dict)
        place = Place(published.name, path=str(published.folder))
        assert sampler.load_published(place.to_json()) == {"name": published.name}
        for name, tensor in policy.state_dict().items():
            assert torch.equal(sampler.model.state_dict()[name], tensor), name


def test_experts_travel_one_by_one():
    model = of_family("qwen3_moe")
    names = checkpoint_weights(FakeEngine(model), dict(model.state_dict()))
    assert any("experts.0." in name for name in names)
    assert transformers_major() < 5 or not any("experts.0." in name for name in model.state_dict())


def test_weights_lack_nothing_and_fit(tmp_path):
    policy = tiny_llama(seed=1)
    tensors = dict(policy.state_dict())
    for change, message in (
        ({"model.norm.weight": None}, "lack model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \(3,\) there, \(64,\) here"),
    ):
        wrong = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        published = write_weights(tmp_path, 0, wrong)
        sampler = OwnSampler(tiny_llama())
        before = sampler.weight_checksums()
        place = Place(published.name, path=str(published.folder)).to_json()
        with pytest.raises(ValueError, match=message):
            sampler.load_published(place)
        assert sampler.weight_checksums() == before and sampler.loaded == "start"


def test_weights_keep_their_precision_and_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr("coati.experience_maker.rollouts.weight_files.MAX_FILE", 100_000)
    tensors = {f"t{i}": torch.randn(100, 70).to(torch.bfloat16) for i in range(9)}
    published = write_weights(tmp_path, 3, tensors)
    assert len(list(published.folder.glob("*.safetensors"))) == 2
    place = Place(published.name, path=str(published.folder))
    found = dict(read_weights(place, read_index(place)))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert published.digests["t3"] == (digest(tensors["t3"]), "bfloat16", 2)
    again = write_weights(tmp_path, 3, tensors)
    assert again == published and len(list(tmp_path.iterdir())) == 1
    other = write_weights(tmp_path, 3, {**tensors, "t0": tensors["t1"].clone()})
    assert other.name != published.name and other.name.startswith("3-")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, 0, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_weights_are_served_to_who_has_the_token_and_nothing_else_is(tmp_path):
    (tmp_path / "secret").write_text("no")
    published = write_weights(tmp_path / "weights", 1, {"a": torch.ones(2)})
    server = WeightServer(tmp_path / "weights", ["http://127.0.0.1:1", "http://localhost:2"])
    try:
        place = server.place(published, "http://127.0.0.1:1")
        assert place.url.startswith("http://127.0.0.1:")
        assert dict(read_weights(place, read_index(place)))["a"].tolist() == [1, 1]
        with pytest.raises(ValueError, match="401"):
            read_index(Place(place.name, url=place.url, token="other"))
        base = place.url.rpartition("/")[0]
        for url in (f"{base}/..", f"{base}/{published.name}/../..", f"{base}/%2e%2e"):
            with pytest.raises(ValueError, match="404"):
                read_index(Place("secret", url=url, token=place.token))
    finally:
        server.close()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"name": "a"}', '{"name": "a", "path": "b", "url": "c"}', '{"other": 1}']
)
def test_what_is_no_place_of_weights_is_refused(text):
    with pytest.raises(ValueError, match="published weights"):
        Place.from_json(text)


def test_what_a_sampler_fails_with_is_answered(server, monkeypatch):
    def full(body):
        raise torch.OutOfMemoryError("no room for 14 GiB")

    monkeypatch.setattr(server.sampler, "complete", full)
    status, found = call(server, "/v1/completions", completion())
    assert status == 500 and "OutOfMemoryError: no room for 14 GiB" in str(found)


def test_a_full_disk_is_an_error_of_the_system_whatever_safetensors_makes_of_it(
    tmp_path, monkeypatch
):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_weights(tmp_path, 0, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_min_p_reaches_the_sampler(server):
    asked = completion(temperature=1.0, min_p=0.999)
    greedy = completion(temperature=0.0)
    answers = [call(server, "/v1/completions", one)[1]["choices"] for one in (asked, greedy)]
    assert [one["token_ids"] for one in answers[0]] == [one["token_ids"] for one in answers[1]]
