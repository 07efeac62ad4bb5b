"""The engine: many answers at once, limits, and places that become free."""

import threading

import pytest
import torch

from coati.inference.serve.inference_engine import PromptTooLong, QueueFull, SamplingParams
from coati.models.generation.loop import generate
from coati.models.generation.sampling import Sampling
from tests.inference.serving import GREEDY, engine_of, until


class Asked:
    """One request and what came of it."""

    def __init__(self, engine, text, new=20, **params):
        self.chunks, self._done = [], threading.Event()
        prompt = engine.encode([{"role": "user", "content": text}])
        self.request = engine.submit(
            prompt, SamplingParams(params.pop("sampling", GREEDY), new, **params), self._take
        )

    def _take(self, chunk):
        self.chunks.append(chunk)
        if chunk.finish:
            self._done.set()

    def wait(self):
        assert self._done.wait(30)
        return self

    @property
    def text(self):
        return "".join(chunk.text for chunk in self.wait().chunks)

    @property
    def finish(self):
        return self.wait().chunks[-1].finish


def outcome(engine, name):
    return engine.metrics.requests.labels(name)._value.get()


def test_more_requests_than_places_get_the_answers_of_single_ones():
    with engine_of(max_batch=3) as engine:
        asked = [Asked(engine, "hello there " * (1 + 3 * (k % 4)), 10 + 5 * k) for k in range(9)]
        for each in asked:
            assert each.finish in ("stop", "length")
            request = each.request
            expected = generate(
                engine.loaded.model,
                torch.tensor([request.prompt]),
                stop_sequences=engine.stops,
                max_new_tokens=request.params.max_new_tokens,
                do_sample=False,
            )
            assert request.tokens == expected.responses()[0]
            assert each.chunks[-1].tokens == len(request.tokens)
        assert engine.metrics.generated._value.get() == sum(
            len(each.request.tokens) for each in asked
        )
        assert until(lambda: engine.running == engine.waiting == 0)


def test_a_request_joins_while_others_are_answered():
    with engine_of(endless=True, pause=0.01) as engine:
        long = Asked(engine, "hello", 200)
        assert until(lambda: len(long.request.tokens) > 5)
        assert Asked(engine, "you", 5).finish == "length"
        assert len(long.request.tokens) < 200
        long.request.cancel()


def test_the_queue_has_an_end():
    with engine_of(endless=True, pause=0.01, max_batch=1, max_queue=2) as engine:
        first = Asked(engine, "hello", 300)
        assert until(lambda: engine.running == 1)
        waiting = [Asked(engine, "you", 2) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests are already waiting"):
            Asked(engine, "too many")
        assert outcome(engine, "queue_full") == 1
        first.request.cancel()
        assert [each.finish for each in waiting] == ["length", "length"]


def test_a_canceled_request_frees_its_place_running_or_waiting():
    with engine_of(endless=True, pause=0.01, max_batch=1) as engine:
        first, second, third = (Asked(engine, "hello", 200) for _ in range(3))
        assert until(lambda: engine.running == 1)
        second.request.cancel()
        assert second.finish == "canceled" and second.request.tokens == []
        first.request.cancel()
        assert first.finish == "canceled"
        assert until(lambda: len(third.request.tokens) > 0)
        third.request.cancel()
        assert until(lambda: engine.running == 0) and outcome(engine, "canceled") == 3


def test_time_runs_out_running_or_waiting():
    with engine_of(endless=True, pause=0.02, max_batch=1, timeout=0.3) as engine:
        running, waiting = Asked(engine, "hello", 400), Asked(engine, "hello", 400)
        assert running.finish == waiting.finish == "timeout"
        assert 0 < len(running.request.tokens) < 400 and waiting.chunks[-1].text == ""


def test_prompt_and_answer_have_to_fit():
    with engine_of(max_length=64) as engine:
        with pytest.raises(
            PromptTooLong,
            match=r"has \d+ tokens and the response up to 60, together more than this server's "
            "limit of 64",
        ):
            Asked(engine, "hello", 60)
    with engine_of(max_length=10**6) as engine:
        assert engine.max_length == 512  # what the model has


def test_stop_strings_and_words_end_an_answer_before_them():
    with engine_of(endless=True) as engine:
        whole = Asked(engine, "hello", 40).text
        assert len(whole) > 8
        stop = whole[4:6]
        stopped = Asked(engine, "hello", 40, stop=[stop])
        assert stopped.text == whole[: whole.index(stop)] and stopped.finish == "stop"
        assert len(stopped.request.tokens) < 40


def test_an_error_ends_the_answers_it_concerns_and_nothing_else(capsys):
    with engine_of(endless=True, pause=0.01) as engine:
        healthy = engine._step

        def broken():
            raise RuntimeError("out of memory")

        asked = Asked(engine, "hello", 300)
        assert until(lambda: asked.request.tokens)
        engine._step = broken
        assert asked.finish == "error"
        engine._step = healthy
        assert Asked(engine, "hello", 3).finish == "length"
        assert "an error ended 1 responses: RuntimeError: out of memory" in capsys.readouterr().err


def test_a_prompt_that_fails_ends_no_other_response(capsys):
    with engine_of(endless=True, pause=0.01) as engine:
        first = Asked(engine, "hello", 60)
        assert until(lambda: first.request.tokens)
        forward = engine.loaded.model.forward

        def full(input_ids=None, **inputs):
            if input_ids.shape[1] > 1:
                raise RuntimeError("out of memory")
            return forward(input_ids=input_ids, **inputs)

        engine.loaded.model.forward = full
        assert Asked(engine, "a long prompt", 20).finish == "error"
        assert first.finish == "length" and len(first.request.tokens) == 60
        assert "an error ended a response: RuntimeError: out of memory" in capsys.readouterr().err


def test_closing_tells_those_who_wait():
    with engine_of(endless=True, pause=0.01, max_batch=1) as engine:
        asked = [Asked(engine, "hello", 400) for _ in range(2)]
        assert until(lambda: engine.running == 1)
        engine.close()
        assert [each.finish for each in asked] == ["closed", "closed"] and not engine.alive
        with pytest.raises(QueueFull, match="shutting down"):
            Asked(engine, "hello")


def test_settings_are_each_requests_own():
    with engine_of(endless=True) as engine:
        hot = [
            Asked(engine, "hello", 20, sampling=Sampling(temperature=2.0), seed=seed)
            for seed in (1, 2, 1)
        ]
        cold = Asked(engine, "hello", 20)
        assert hot[0].text == hot[2].text != hot[1].text
        assert cold.text == Asked(engine, "hello", 20).text
