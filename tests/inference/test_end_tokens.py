"""A model with several end tokens in generation_config.json ends at any of them, everywhere, as in
transformers' generate."""

import json
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from coati.inference import ChatSession, load
from coati.inference.evaluate.generate_responses import Prompt, SamplingConfig, generate_responses
from coati.inference.export.model_dir import export
from coati.inference.serve.inference_engine import InferenceEngine, SamplingParams
from coati.models.generation.end_tokens import end_tokens, stop_sequences
from coati.models.generation.sampling import Sampling
from coati.recipes import eval_samples
from coati.trainer.boosted_rl import Generation
from tests.experience_maker.test_rollout import FakeEngine
from tests.tiny import tiny_llama, tiny_tokenizer

SAID = 77
HELLO = [{"role": "user", "content": "hello"}]
GREEDY = Sampling(do_sample=False)


def always(token):
    """A model that says ``token`` whatever it is asked."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()[:, 0] = 1
        model.lm_head.weight.zero_()[token, 0] = 5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def saved(folder, ends):
    always(SAID).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("ends") / "model", [2, SAID])


@pytest.fixture
def loaded(directory):
    return load(directory)


def test_transformers_ends_there_too(directory):
    plain = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[5, 6]])
    assert plain.generate(ids, max_new_tokens=9, do_sample=False)[0].tolist() == [5, 6, SAID]


def test_all_of_them_are_found_once(loaded):
    assert end_tokens(loaded.model) == [2, SAID]
    assert loaded.stop_sequences() == [[2], [SAID]]
    outer = torch.nn.Module()  # as plugins wrap a model
    outer.module = loaded.model
    assert end_tokens(outer) == [2, SAID]
    assert stop_sequences([[7, 8], [SAID]], loaded.tokenizer, loaded.model) == [[7, 8], [SAID], [2]]
    loaded.model.generation_config.eos_token_id = -1  # "none" in early conversions
    assert stop_sequences([], loaded.tokenizer, loaded.model) == [[2]]
    loaded.model.generation_config.eos_token_id = None  # transformers takes the configuration's
    loaded.model.config.eos_token_id = [9, 10]
    assert end_tokens(loaded.model) == [9, 10]


def test_chat(loaded):
    chat = ChatSession(*loaded, max_new_tokens=10, sampling=GREEDY)
    assert "".join(chat.ask("hello")) == "" and not chat.cut


def test_server(loaded):
    chunks, done = [], threading.Event()

    def take(chunk):
        chunks.append(chunk)
        if chunk.finish:
            done.set()

    engine = InferenceEngine(loaded)
    try:
        engine.submit(engine.encode(HELLO), SamplingParams(GREEDY, 10), take)
        assert done.wait(30)
    finally:
        engine.close()
    assert [(chunk.text, chunk.finish, chunk.tokens) for chunk in chunks] == [("", "stop", 1)]


def test_responses_to_files(loaded):
    found, _ = generate_responses(loaded, [Prompt("p", 0, HELLO)], SamplingConfig(GREEDY, 10))
    assert found[0].ids == [SAID] and found[0].stopped and found[0].text == ""


def test_samples_at_evaluations(loaded):
    engine = FakeEngine(loaded.model)
    stops = loaded.conversation.stop_ids
    [(_, response)] = eval_samples._samples(engine, [[5, 6]], loaded.tokenizer, stops)
    assert response == ""


def test_keyword_trainers(loaded):
    made = Generation.of(loaded.tokenizer, loaded.model, {"max_new_tokens": 4})
    assert made.stop_sequences == [[2], [SAID]]
    given = {"max_new_tokens": 4, "stop_token_ids": [5]}  # what was asked for, and nothing else
    assert Generation.of(loaded.tokenizer, loaded.model, given).stop_sequences == [[5]]


def test_an_export_keeps_the_list(directory, tmp_path):
    found = export(directory, tmp_path / "out", lambda *_: "", max_new_tokens=5)
    assert found.same == found.asked
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, SAID]
