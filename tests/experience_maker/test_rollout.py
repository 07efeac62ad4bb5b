"""The rollout boundary: the model itself, and vLLM behind it (a stand-in here: it records what it
is given)."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from coati.experience_maker.rollouts.rollout_engine import ModelRollout, make_rollout
from coati.experience_maker.rollouts.vllm_rollout import cut
from coati.models.generation.loop import Sampling, generate
from coati.models.generation.row_noise import NoiseRows, row_noise
from coati.parallel.options import ParallelOptions
from tests.tiny import tiny_llama

PROMPTS = torch.tensor([[2, 2, 5, 17], [9, 11, 42, 7]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
NOISE = NoiseRows(seed=0, episode=0, rows=[0, 1])
SETTINGS = {"stop_sequences": [[30], [7, 8]], "max_new_tokens": 6, "pad_token_id": 0}


class FakeEngine(SimpleNamespace):
    """What sampling needs of an engine that splits nothing."""

    def __init__(self, model):
        mesh = SimpleNamespace(sharded_forward=False, tp_group=None, pp_size=1)
        super().__init__(
            model=model,
            module=model,
            mesh=mesh,
            options=ParallelOptions(),
            plugin=None,
            padding_free=None,
            device=torch.device("cpu"),
            lr_scheduler=SimpleNamespace(last_epoch=0),
        )


def test_the_model_samples_with_the_temperature_it_is_asked_for():
    model = tiny_llama()
    rollout = make_rollout(
        "model", FakeEngine(model), model_path="", sampling=Sampling(temperature=0.1), **SETTINGS
    )
    assert isinstance(rollout, ModelRollout)
    for temperature in (1.5, 0.7):
        found = rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=temperature).result()
        options = {
            "noise": row_noise(0, 0, [0, 1], 6),
            "temperature": temperature,
            "return_logprobs": True,
            **SETTINGS,
        }
        expected = generate(model, PROMPTS, MASK, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.logprobs, expected.logprobs) and (found.logprobs < 0).any()


def test_a_model_that_cannot_sample_is_refused_at_once():
    engine = FakeEngine(tiny_llama())
    engine.options = ParallelOptions(pp=2)
    with pytest.raises(ValueError, match="--pp"):
        ModelRollout(engine, sampling=Sampling(), **SETTINGS)


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match="--rollout_engine sglang: unknown; choose model or vllm"):
        make_rollout(
            "sglang", FakeEngine(tiny_llama()), model_path="", sampling=Sampling(), **SETTINGS
        )


def test_without_vllm_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ValueError, match="--rollout_engine vllm: vllm cannot be imported .*--rollout_engine model"
    ):
        make_rollout(
            "vllm", FakeEngine(tiny_llama()), model_path="", sampling=Sampling(), **SETTINGS
        )


@pytest.fixture
def vllm(monkeypatch):
    """A module in vLLM's place, whose answers are scripted."""
    module = ModuleType("vllm")
    module.loaded, module.asked, module.answers = [], [], [[4, 7, 8, 9, 9, 9], [3, 30]]

    class LLM:
        def __init__(self, **options):
            module.options = options
            model = SimpleNamespace(
                load_weights=lambda weights: module.loaded.append(dict(weights))
            )
            runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

        def generate(self, prompts, parameters, use_tqdm):
            module.asked.append((prompts, parameters))
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(answer))])
                for answer in module.answers
            ]

    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(
        "coati.experience_maker.rollouts.vllm_rollout.is_lora", lambda engine: False
    )
    return module


def rollout(engine, **sampling):
    return make_rollout(
        "vllm", engine, model_path="some/model", sampling=Sampling(**sampling), **SETTINGS
    )


def test_vllm_gets_prompts_without_padding_and_its_answers_end_where_the_stop_sequences_say(vllm):
    sampler = rollout(FakeEngine(tiny_llama()), top_k=5, top_p=0.9)
    found = sampler.ask(PROMPTS, MASK, noise=NOISE, temperature=0.8).result()
    prompts, parameters = vllm.asked[0]
    assert vllm.options["model"] == "some/model"
    assert prompts == [{"prompt_token_ids": [5, 17]}, {"prompt_token_ids": [9, 11, 42, 7]}]
    first_numbers = row_noise(0, 0, [0, 1], 1)[:, 0]
    assert [p.seed for p in parameters] == [int(number * 2**31) for number in first_numbers]
    first = parameters[0]
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.8, 5, 0.9, 6)
    assert first.ignore_eos and first.stop_token_ids == [30]
    assert found.responses() == [[4, 7, 8], [3, 30]] and found.stopped.tolist() == [True, True]
    assert found.sequences.tolist() == [[2, 2, 5, 17, 4, 7, 8], [9, 11, 42, 7, 3, 30, 0]]
    assert found.prompt_length == 4 and found.logprobs is None  # to be recomputed by the policy


def test_vllm_gets_the_published_weights_and_says_their_version(vllm):
    model = tiny_llama()
    sampler = rollout(FakeEngine(model))
    sampler.publish(7, iter(model.state_dict().items()))
    assert [weights.keys() for weights in vllm.loaded] == [model.state_dict().keys()]
    for _ in range(2):
        found = sampler.ask(PROMPTS, MASK, noise=NOISE, temperature=1.0).result()
        assert found.version == 7
    assert len(vllm.loaded) == 1


def test_vllm_in_another_process_is_refused(vllm):
    sampler = rollout(FakeEngine(tiny_llama()), do_sample=False)
    del sampler.llm.llm_engine.model_executor
    with pytest.raises(ValueError, match="weights of vllm of unknown version cannot be reached"):
        sampler.publish(1, iter(()))


def test_vllm_with_several_processes_is_refused(vllm, monkeypatch):
    monkeypatch.setattr("coati.experience_maker.rollouts.vllm_rollout.world_size", lambda: 2)
    with pytest.raises(ValueError, match="one process, not 2"):
        rollout(FakeEngine(tiny_llama()))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 7, 8, 30], ([1, 7, 8], True)),
        ([1, 2, 3], ([1, 2, 3], False)),
        ([1, 2, 3, 4, 30, 1], ([1, 2, 3, 4], False)),  # beyond the limit
        ([], ([], False)),
    ],
)
def test_answers_are_cut_at_the_first_complete_stop_sequence(tokens, expected):
    assert cut(tokens, [(30,), (7, 8)], 4) == expected
