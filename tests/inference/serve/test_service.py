"""The engine: many answers at once, limits, and places that become free."""

import threading

import pytest
import torch

from coati.inference.serve.service import PromptTooLong, QueueFull, SamplingParams
from coati.models.generation.loop import generate
from coati.models.generation.sampling import Sampling
from tests.inference.serving import GREEDY, service_of, until


class Asked:
    """One request and what came of it."""

    def __init__(self, service, text, new=20, **wish):
        self.pieces, self._done = [], threading.Event()
        prompt = service.encode([{"role": "user", "content": text}])
        self.ticket = service.submit(
            prompt, SamplingParams(wish.pop("sampling", GREEDY), new, **wish), self._take
        )

    def _take(self, piece):
        self.pieces.append(piece)
        if piece.finish:
            self._done.set()

    def wait(self):
        assert self._done.wait(30)
        return self

    @property
    def text(self):
        return "".join(piece.text for piece in self.wait().pieces)

    @property
    def finish(self):
        return self.wait().pieces[-1].finish


def outcome(service, name):
    return service.metrics.requests.labels(name)._value.get()


def test_more_requests_than_places_get_the_answers_of_single_ones():
    with service_of(max_batch=3) as service:
        asked = [Asked(service, "hello there " * (1 + 3 * (k % 4)), 10 + 5 * k) for k in range(9)]
        for each in asked:
            assert each.finish in ("stop", "length")
            row = each.ticket.row
            expected = generate(
                service.loaded.model,
                torch.tensor([row.prompt]),
                stop_sequences=service.stops,
                max_new_tokens=row.max_new_tokens,
                do_sample=False,
            )
            assert row.tokens == expected.answers()[0] and each.pieces[-1].tokens == len(row.tokens)
        assert service.metrics.generated._value.get() == sum(
            len(each.ticket.row.tokens) for each in asked
        )
        assert until(lambda: service.running == service.waiting == 0)


def test_a_request_joins_while_others_are_answered():
    with service_of(endless=True, pause=0.01) as service:
        long = Asked(service, "hello", 200)
        assert until(lambda: len(long.ticket.row.tokens) > 5)
        assert Asked(service, "you", 5).finish == "length"
        assert len(long.ticket.row.tokens) < 200
        long.ticket.cancel()


def test_the_queue_has_an_end():
    with service_of(endless=True, pause=0.01, max_batch=1, max_queue=2) as service:
        first = Asked(service, "hello", 300)
        assert until(lambda: service.running == 1)
        waiting = [Asked(service, "you", 2) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            Asked(service, "too many")
        assert outcome(service, "queue_full") == 1
        first.ticket.cancel()
        assert [each.finish for each in waiting] == ["length", "length"]


def test_a_canceled_request_frees_its_place_running_or_waiting():
    with service_of(endless=True, pause=0.01, max_batch=1) as service:
        first, second, third = (Asked(service, "hello", 200) for _ in range(3))
        assert until(lambda: service.running == 1)
        second.ticket.cancel()
        assert second.finish == "canceled" and second.ticket.row.tokens == []
        first.ticket.cancel()
        assert first.finish == "canceled"
        assert until(lambda: len(third.ticket.row.tokens) > 0)
        third.ticket.cancel()
        assert until(lambda: service.running == 0) and outcome(service, "canceled") == 3


def test_time_runs_out_running_or_waiting():
    with service_of(endless=True, pause=0.02, max_batch=1, timeout=0.3) as service:
        running, waiting = Asked(service, "hello", 400), Asked(service, "hello", 400)
        assert running.finish == waiting.finish == "timeout"
        assert 0 < len(running.ticket.row.tokens) < 400 and waiting.pieces[-1].text == ""


def test_prompt_and_answer_have_to_fit():
    with service_of(max_length=64) as service:
        with pytest.raises(
            PromptTooLong,
            match=r"takes \d+ tokens and the answer up to 60, together more than the 64",
        ):
            Asked(service, "hello", 60)
    with service_of(max_length=10**6) as service:
        assert service.max_length == 512  # what the model has


def test_stop_strings_and_words_end_an_answer_before_them():
    with service_of(endless=True) as service:
        whole = Asked(service, "hello", 40).text
        assert len(whole) > 8
        stop = whole[4:6]
        stopped = Asked(service, "hello", 40, stop=[stop])
        assert stopped.text == whole[: whole.index(stop)] and stopped.finish == "stop"
        assert len(stopped.ticket.row.tokens) < 40


def test_an_error_ends_the_answers_it_concerns_and_nothing_else(capsys):
    with service_of(endless=True, pause=0.01) as service:
        healthy = service._batch.step

        def broken():
            raise RuntimeError("out of memory")

        asked = Asked(service, "hello", 300)
        assert until(lambda: asked.ticket.row.tokens)
        service._batch.step = broken
        assert asked.finish == "error"
        service._batch.step = healthy
        assert Asked(service, "hello", 3).finish == "length"
        assert "an error ended 1 answers: RuntimeError: out of memory" in capsys.readouterr().err


def test_closing_tells_those_who_wait():
    with service_of(endless=True, pause=0.01, max_batch=1) as service:
        asked = [Asked(service, "hello", 400) for _ in range(2)]
        assert until(lambda: service.running == 1)
        service.close()
        assert [each.finish for each in asked] == ["closed", "closed"] and not service.alive
        with pytest.raises(QueueFull, match="shutting down"):
            Asked(service, "hello")


def test_settings_are_each_requests_own():
    with service_of(endless=True) as service:
        hot = [
            Asked(service, "hello", 20, sampling=Sampling(temperature=2.0), seed=seed)
            for seed in (1, 2, 1)
        ]
        cold = Asked(service, "hello", 20)
        assert hot[0].text == hot[2].text != hot[1].text
        assert cold.text == Asked(service, "hello", 20).text
