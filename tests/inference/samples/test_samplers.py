"""Engines that draw responses: the same ones whatever is drawn beside them, by the model here, by
rollout servers and by vLLM; and any OpenAI-compatible server."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from transformers import GenerationConfig

from coati.inference.evaluate.generate_responses import (
    Prompt,
    SamplingConfig,
    generate_responses,
)
from coati.inference.model_loading import load
from coati.inference.samples.api_sampler import ApiSampler
from coati.inference.samples.samplers import (
    Configurations,
    Draw,
    ModelSampler,
    ServerSampler,
    VllmSampler,
    fingerprint_of,
)
from coati.models.generation.sampling import Sampling
from tests.experience_maker.rollout_servers import Server
from tests.rewards.endpoints import answering
from tests.tiny import tiny_llama, tiny_tokenizer

CONFIG = SamplingConfig(Sampling(), max_new_tokens=9, max_length=128, batch_size=3, seed=7)
TEXTS = ("hello", "hello there, how are you today?", "you")


def prompts() -> list[Prompt]:
    return [
        Prompt(f"f:{k + 1}", k * 3, [{"role": "user", "content": text}])
        for k, text in enumerate(TEXTS)
    ]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(model_path):
    return load(model_path, device="cpu")


def drawn(sampler, count: int = 3, chosen=lambda draw: True) -> dict:
    """Responses by (number, sample)."""
    ready, skipped = sampler.ready(prompts())
    assert not skipped
    wanted = [Draw(prompt, sample) for prompt in ready for sample in range(count)]
    found = []
    sampler.draw([draw for draw in wanted if chosen(draw)], found.extend)
    return {(each.number, each.sample): each for each in found}


def test_a_response_does_not_depend_on_what_is_drawn_beside_it(loaded):
    whole = drawn(ModelSampler(loaded, CONFIG))
    assert len(whole) == 9 and len({each.text for each in whole.values()}) > 6
    alone = drawn(
        ModelSampler(loaded, replace(CONFIG, batch_size=1)),
        5,
        lambda draw: (draw.prompt.number, draw.sample) in [(3, 2), (0, 4)],
    )
    assert alone[3, 2] == whole[3, 2] and (0, 4) in alone
    other = drawn(ModelSampler(loaded, replace(CONFIG, seed=8)))
    assert other[0, 0].text != whole[0, 0].text


def test_the_first_response_is_that_of_compare(loaded):
    found, _ = generate_responses(loaded, prompts(), CONFIG)
    first = drawn(ModelSampler(loaded, CONFIG), 1)
    assert {number: each.text for number, each in found.items()} == {
        number: each.text for (number, _), each in first.items()
    }


def test_a_rollout_server_draws_what_the_model_here_does(model_path, loaded):
    parts = loaded._replace(model=Configurations(model_path))
    server = Server(loaded.model, token="secret")
    try:
        sampler = ServerSampler([server.url], parts, CONFIG, token="secret")
        assert drawn(sampler) == drawn(ModelSampler(loaded, CONFIG))
        with pytest.raises(ValueError, match="--rollout_url .*--rollout_token_env"):
            ServerSampler([server.url], parts, CONFIG)
    finally:
        server.stop()


def test_two_servers_share_the_rows(model_path, loaded):
    parts = loaded._replace(model=Configurations(model_path))
    servers = [Server(loaded.model), Server(loaded.model)]
    try:
        sampler = ServerSampler([server.url for server in servers], parts, CONFIG)
        assert drawn(sampler, 4) == drawn(ModelSampler(loaded, CONFIG), 4)
    finally:
        for server in servers:
            server.stop()


def test_a_server_of_another_model_or_with_other_weights_is_refused(model_path, loaded):
    parts = loaded._replace(model=Configurations(model_path))
    other = Server(tiny_llama(layers=2))
    try:
        with pytest.raises(ValueError, match="serves another model: num_hidden_layers 2 there"):
            ServerSampler([other.url], parts, CONFIG)
    finally:
        other.stop()
    trained = Server(loaded.model)
    try:
        sampler = ServerSampler([trained.url], parts, CONFIG)
        trained.sampler.loaded = "step-3"
        with pytest.raises(ValueError, match="--rollout_url .*weights step-3 are loaded"):
            drawn(sampler)
    finally:
        trained.stop()


def test_nobody_there(model_path, loaded):
    parts = loaded._replace(model=Configurations(model_path))
    with pytest.raises(ValueError, match="--rollout_url http://127.0.0.1:9: nothing answers"):
        ServerSampler(["http://127.0.0.1:9"], parts, CONFIG)


def test_a_prompt_without_room_is_named(loaded):
    sampler = ModelSampler(loaded, replace(CONFIG, max_length=24))
    ready, skipped = sampler.ready(prompts())
    assert [prompt.place for prompt in ready] == ["f:1", "f:3"]
    assert skipped[0][0] == "f:2" and skipped[0][1].startswith("too_long: ")


@pytest.fixture
def vllm(monkeypatch):
    """In vLLM's place a module that answers each prompt with its seed's remainder."""
    module = ModuleType("vllm")
    module.asked = []

    class LLM:
        def __init__(self, **options):
            module.options = options

        def generate(self, asked, parameters, use_tqdm):
            module.asked += list(zip(asked, parameters, strict=True))
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=(50 + each.seed % 7, 60, 2, 9))])
                for each in parameters
            ]

    module.LLM = LLM
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_is_given_ids_and_a_seed_for_each_response(vllm, model_path, loaded):
    parts = loaded._replace(model=Configurations(model_path))
    sampler = VllmSampler(model_path, parts, CONFIG, 0.4, False)
    found = drawn(sampler)
    assert len({parameters.seed for _, parameters in vllm.asked}) == 9
    assert all(parameters.max_tokens == 9 for _, parameters in vllm.asked)
    ids = loaded.conversation.encode_prompt(prompts()[0].messages).input_ids
    assert {"prompt_token_ids": ids} in [asked for asked, _ in vllm.asked]
    assert all(each.stopped and each.tokens == 3 for each in found.values())
    again = {(e.number, e.sample): e for e in drawn(sampler, 3).values()}
    assert again == found
    assert vllm.options["max_model_len"] == 128 and vllm.options["model"] == model_path


def test_vllm_takes_no_adapter(vllm, model_path, loaded, tmp_path):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model_path}"}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a LoRA adapter; merge it first"):
        VllmSampler(str(tmp_path), loaded, CONFIG, 0.4, False)


def said(content: str | None, finish: str = "stop", **more) -> dict:
    message = {"role": "assistant", "content": content, **more}
    return {
        "choices": [{"message": message, "finish_reason": finish}],
        "usage": {"completion_tokens": 5},
    }


def test_any_server_is_asked_for_chat_completions(monkeypatch):
    monkeypatch.setenv("COATI_API_KEY", "sesame")
    keys = []

    def answer(number, body, headers):
        keys.append(headers["Authorization"])
        return said(f"to {body['messages'][-1]['content']} {body['seed']}", "length")

    with answering(answer) as server:
        config = replace(CONFIG, sampling=Sampling(temperature=0.5, top_k=4, top_p=0.9))
        found = drawn(ApiSampler(server.url, "name", config))
        bodies = server.bodies
    assert set(keys) == {"Bearer sesame"} and len(found) == len(bodies) == 9
    assert {body["model"] for body in bodies} == {"name"}
    assert {(b["temperature"], b["top_k"], b["top_p"], b["max_tokens"]) for b in bodies} == {
        (0.5, 4, 0.9, 9)
    }
    assert len({body["seed"] for body in bodies}) == 9 and "repetition_penalty" not in bodies[0]
    one = found[3, 1]
    assert one.text.startswith("to hello there") and one.tokens == 5 and not one.stopped
    assert one.message == {"role": "assistant", "content": one.text}


def test_seeds_of_an_api_do_not_depend_on_the_order():
    with answering(lambda number, body, headers: said(str(body["seed"]))) as server:
        sampler = ApiSampler(server.url, "name", CONFIG)
        whole = drawn(sampler)
        alone = drawn(sampler, 3, lambda draw: (draw.prompt.number, draw.sample) == (6, 2))
    assert alone[6, 2] == whole[6, 2]


def test_thoughts_and_calls_of_an_api_become_parts_of_the_message():
    call = {"id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    answer = said(None, reasoning_content="hm", tool_calls=[call])
    with answering(lambda *_: answer) as server:
        sampler = ApiSampler(server.url, "m", CONFIG)
        before = {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
            ],
        }
        messages = [
            {"role": "user", "content": "q"},
            before,
            {"role": "tool", "content": "2", "name": "add"},
        ]
        found = []
        prompt = Prompt("f:1", 0, messages, tools=[tool])
        sampler.draw([Draw(prompt, 0)], found.extend)
        body = server.bodies[0]
    [one] = found
    assert one.text == "<think>hm</think>"
    assert one.message == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}
        ],
    }
    assert body["tools"] == [tool]
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 2}'


def test_a_newer_api_is_told_the_limit_by_its_other_name():
    def answer(number, body, headers):
        if "max_tokens" in body:
            return 400, {"error": {"message": "use max_completion_tokens instead"}}
        return said("yes")

    with answering(answer) as server:
        found = drawn(ApiSampler(server.url, "m", replace(CONFIG, batch_size=1)))
        bodies = server.bodies
    assert len(found) == 9 and len(bodies) == 10  # refused once
    assert bodies[-1]["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": {"message": "too long"}}), "status 400: too long"),
        ((401, "no"), "status 401"),
        ({"choices": []}, "expected OpenAI's chat completion"),
        ({"choices": [{"message": "text"}]}, "expected OpenAI's chat completion"),
    ],
)
def test_what_an_api_answers_wrongly_names_the_prompt(answer, message):
    with answering(lambda *_: answer) as server:
        with pytest.raises(ValueError, match=f"f:\\d: --api_url .*{message}"):
            drawn(ApiSampler(server.url, "m", CONFIG))


def test_a_call_that_was_cut_off_is_what_the_model_said():
    call = {"function": {"name": "f", "arguments": '{"a": 1'}}
    with answering(lambda *_: said("x", tool_calls=[call])) as server:
        found = list(drawn(ApiSampler(server.url, "m", CONFIG)).values())
    assert {each.text for each in found} == {'x\nf({"a": 1)'}
    assert not any(each.stopped or "tool_calls" in each.message for each in found)


def test_a_thought_that_the_prompt_opens_has_no_opening_tag():
    tags = {"think_start": {"text": "<t>", "num_occur": 0}, "think_end": {"text": "</t>"}}
    with answering(lambda *_: said("7", reasoning_content="hm")) as server:
        opened = drawn(ApiSampler(server.url, "m", CONFIG, tags))
        tags["think_start"]["num_occur"] = 1
        whole = drawn(ApiSampler(server.url, "m", CONFIG, tags))
    assert {each.text for each in opened.values()} == {"hm</t>7"}
    assert {each.text for each in whole.values()} == {"<t>hm</t>7"}


def test_what_an_api_answered_before_it_failed_is_kept():
    def answer(number, body, headers):
        return said("good") if number < 4 else (400, "no more")

    kept = []
    with answering(answer) as server:
        sampler = ApiSampler(server.url, "m", replace(CONFIG, batch_size=1))
        wanted = [Draw(prompt, sample) for prompt in prompts() for sample in range(3)]
        with pytest.raises(ValueError, match="no more"):
            sampler.draw(wanted, kept.extend)
    assert len(kept) == 4


def test_a_model_is_known_by_its_files(model_path, tmp_path):
    first = fingerprint_of(model_path)
    assert {"config.json", "model.safetensors"} <= first.keys()
    tiny_llama(1, layers=1).save_pretrained(tmp_path)
    other = fingerprint_of(tmp_path)
    assert other["model.safetensors"] != first["model.safetensors"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model_path}"}}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert fingerprint_of(adapter)["base/model.safetensors"] == first["model.safetensors"]
    assert fingerprint_of("owner/name") == "owner/name"


def test_configurations_stand_for_a_model_elsewhere(model_path, tmp_path):
    found = Configurations(model_path)
    assert found.config.model_type == "llama"
    assert isinstance(found.generation_config, GenerationConfig)
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model_path}"}}')
    assert Configurations(tmp_path).config.hidden_size == found.config.hidden_size
