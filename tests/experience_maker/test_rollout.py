"""The rollout boundary: the model itself, and vLLM behind it (a stand-in here: it records what it
is given)."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from coati.experience_maker.rollouts.make_rollout import make_rollout
from coati.experience_maker.rollouts.rollout_client import cut
from coati.experience_maker.rollouts.rollout_engine import ModelRollout
from coati.experience_maker.rollouts.vllm_rollout import VllmOptions
from coati.models.generation.loop import Sampling, generate
from coati.models.generation.row_noise import NoiseRows, row_noise
from coati.parallel.options import ParallelOptions
from tests.experience_maker.rollout_servers import FakeEngine
from tests.tiny import tiny_llama

PROMPTS = torch.tensor([[2, 2, 5, 17], [9, 11, 42, 7]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
NOISE = NoiseRows(seed=0, episode=0, rows=[0, 1])
SETTINGS = {"stop_sequences": [[30], [7, 8]], "max_new_tokens": 6, "pad_token_id": 0}


def test_the_model_samples_with_the_temperature_it_is_asked_for():
    model = tiny_llama()
    rollout = make_rollout(
        "model", FakeEngine(model), sampling=Sampling(temperature=0.1), **SETTINGS
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
    with pytest.raises(ValueError, match="sglang: unknown; choose model, vllm, http or ray"):
        make_rollout("sglang", FakeEngine(tiny_llama()), sampling=Sampling(), **SETTINGS)


def test_without_vllm_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ValueError, match="--rollout_engine vllm: vllm cannot be imported .*--rollout_engine model"
    ):
        rollout(FakeEngine(tiny_llama()))


@pytest.fixture
def vllm(monkeypatch):
    """A module in vLLM's place, whose answers are scripted."""
    module = ModuleType("vllm")
    module.loaded, module.asked, module.answers = [], [], [[4, 7, 8, 9, 9, 9], [3, 30]]
    module.done = []  # in order

    class Runner:
        model = SimpleNamespace(
            load_weights=lambda weights: module.loaded.append(("model", dict(weights)))
        )

        def reload_weights(self, weights_iterator=None, weights_path=None):
            module.loaded.append(("reload", dict(weights_iterator)))

    class LLM:
        def __init__(self, **options):
            module.options = options
            worker = SimpleNamespace(model_runner=Runner())
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

        def collective_rpc(self, method, kwargs):
            module.done.append(method)
            runner = self.llm_engine.model_executor.driver_worker.model_runner
            getattr(runner, method)(**kwargs)

        def generate(self, prompts, parameters, use_tqdm):
            module.done.append("generate")
            module.asked.append((prompts, parameters))
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(answer), logprobs=of)])
                for answer, of in zip(
                    module.answers, map(scripted_logprobs, module.answers), strict=True
                )
            ]

        def sleep(self, level):
            module.done.append(f"sleep {level}")

        def wake_up(self):
            module.done.append("wake_up")

    module.LLM, module.SamplingParams, module.Runner = LLM, SimpleNamespace, Runner
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(
        "coati.experience_maker.rollouts.vllm_rollout.is_lora", lambda engine: False
    )
    return module


def scripted_logprobs(tokens):
    """As vLLM has them: by id, the likeliest beside the sampled one."""
    return [
        {token: SimpleNamespace(logprob=-token / 4), 1: SimpleNamespace(logprob=-0.125)}
        for token in tokens
    ]


def rollout(engine, options=None, **sampling):
    return make_rollout(
        "vllm",
        engine,
        elsewhere=options or VllmOptions("some/model", max_length=64),
        sampling=Sampling(**sampling),
        **SETTINGS,
    )


def test_vllm_gets_prompts_without_padding_and_its_answers_end_where_the_stop_sequences_say(vllm):
    options = VllmOptions("some/model", precision="fp32", max_length=64, memory_share=0.3)
    sampler = rollout(FakeEngine(tiny_llama()), options, top_k=5, top_p=0.9)
    found = sampler.ask(PROMPTS, MASK, noise=NOISE, temperature=0.8).result()
    prompts, parameters = vllm.asked[0]
    wanted = {"model": "some/model", "dtype": "float32", "max_model_len": 64}
    wanted |= {"gpu_memory_utilization": 0.3, "logprobs_mode": "processed_logprobs"}
    assert wanted.items() <= vllm.options.items() and "enable_sleep_mode" not in vllm.options
    assert prompts == [{"prompt_token_ids": [5, 17]}, {"prompt_token_ids": [9, 11, 42, 7]}]
    first_numbers = row_noise(0, 0, [0, 1], 1)[:, 0]
    assert [p.seed for p in parameters] == [int(number * 2**31) for number in first_numbers]
    first = parameters[0]
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.8, 5, 0.9, 6)
    assert first.ignore_eos and first.stop_token_ids == [30]
    assert found.responses() == [[4, 7, 8], [3, 30]] and found.stopped.tolist() == [True, True]
    assert found.sequences.tolist() == [[2, 2, 5, 17, 4, 7, 8], [9, 11, 42, 7, 3, 30, 0]]
    assert found.prompt_length == 4 and found.logprobs is None  # to be recomputed by the policy
    assert found.sampled_logprobs is None  # of what top-k and top-p leave


def test_vllm_gets_the_limit_of_each_row_and_the_seed_of_its_turn(vllm):
    sampler = rollout(FakeEngine(tiny_llama()))
    noise = NoiseRows(0, 0, [0, 1], turn=3)
    asked = sampler.ask(PROMPTS, MASK, noise=noise, temperature=1.0, limits=[2, 1])
    parameters = vllm.asked[0][1]
    assert [each.max_tokens for each in parameters] == [2, 1]
    numbers = row_noise(0, 0, [0, 1], 1, 3)[:, 0]
    assert [each.seed for each in parameters] == [int(number * 2**31) for number in numbers]
    found = asked.result()
    assert found.responses() == [[4, 7], [3]] and found.stopped.tolist() == [False, False]
    assert found.sampled_logprobs.tolist() == [[-1.0, -1.75], [-0.75, 0.0]]


def test_vllm_says_the_log_probs_of_what_it_sampled_up_to_the_stop_sequence(vllm):
    found = rollout(FakeEngine(tiny_llama())).ask(PROMPTS, MASK, noise=NOISE, temperature=0.8)
    assert vllm.asked[0][1][0].logprobs == 0
    expected = [[-1.0, -1.75, -2.0], [-0.75, -7.5, 0.0]]
    assert found.result().sampled_logprobs.tolist() == expected


def test_log_probs_of_a_vllm_that_leaves_the_temperature_out_are_not_used(vllm):
    vllm.EngineArgs = SimpleNamespace()
    found = rollout(FakeEngine(tiny_llama())).ask(PROMPTS, MASK, noise=NOISE, temperature=0.8)
    assert found.result().sampled_logprobs is None and "logprobs_mode" not in vllm.options


def test_vllm_gets_the_published_weights_and_says_their_version(vllm):
    model = tiny_llama(tie=True)
    sampler = rollout(FakeEngine(model))
    sampler.publish(7, iter(model.state_dict().items()))
    names = model.state_dict().keys() - {"lm_head.weight"}  # as files have them
    assert [(way, weights.keys()) for way, weights in vllm.loaded] == [("reload", names)]
    for _ in range(2):
        found = sampler.ask(PROMPTS, MASK, noise=NOISE, temperature=1.0).result()
        assert found.version == 7
    assert len(vllm.loaded) == 1


def test_a_vllm_that_cannot_reload_gets_weights_by_its_model(vllm):
    del vllm.Runner.reload_weights
    model = tiny_llama()
    sampler = rollout(FakeEngine(model))
    sampler.publish(1, iter(model.state_dict().items()))
    assert [(way, weights.keys()) for way, weights in vllm.loaded] == [
        ("model", model.state_dict().keys())
    ]


def test_vllm_sleeps_while_the_model_is_trained_and_wakes_for_weights_and_rollouts(
    vllm, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny_llama()
    sampler = rollout(FakeEngine(model), VllmOptions("some/model", sleep=True))
    assert vllm.options["enable_sleep_mode"] is True
    for version in (0, 1):
        sampler.publish(version, iter(model.state_dict().items()))
        sampler.ask(PROMPTS, MASK, noise=NOISE, temperature=1.0)
    sampler.ask(PROMPTS, MASK, noise=NOISE, temperature=1.0)
    once = ["reload_weights", "generate", "sleep 1", "wake_up"]
    assert vllm.done == [*once, *once, "generate", "sleep 1"]


def test_a_sleep_that_cannot_be_is_refused(vllm, monkeypatch):
    options = VllmOptions("some/model", sleep=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--vllm_sleep frees the memory of a GPU"):
        rollout(FakeEngine(tiny_llama()), options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    del vllm.LLM.sleep
    with pytest.raises(ValueError, match="--vllm_sleep: vllm of unknown version has no sleep"):
        rollout(FakeEngine(tiny_llama()), options)


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


def test_the_model_samples_some_rows_at_a_time_and_replaces_those_that_end():
    model = tiny_llama()
    engine = FakeEngine(model)
    ids, mask = PROMPTS.repeat(4, 1), MASK.repeat(4, 1)
    noise = NoiseRows(seed=0, episode=0, rows=range(8))
    found = []
    for at_once in (None, 3):
        one = ModelRollout(engine, sampling=Sampling(), **SETTINGS)
        assert one.replaces_rows
        one.rows_at_once = at_once
        found.append(one.ask(ids, mask, noise=noise, temperature=1.0).result())
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(found[0].lengths, found[1].lengths)
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs)


def test_a_forward_that_holds_collectives_is_asked_for_whole_batches():
    engine = FakeEngine(tiny_llama())
    engine.mesh.sharded_forward = True
    assert not ModelRollout(engine, sampling=Sampling(), **SETTINGS).replaces_rows
