"""The server's Prometheus metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Metrics of one engine, in a registry of its own, so that several engines of a process do not
    mix. ``running``, ``waiting``: how many requests are, asked when the metrics are read."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "coati_requests",
            "requests by how they ended: stop, length, canceled, timeout, queue_full, ...",
            ["outcome"],
            **own,
        )
        self.prompts = Counter("coati_prompt_tokens", "tokens of prompts", **own)
        self.generated = Counter("coati_generated_tokens", "tokens of responses", **own)
        self.seconds = Histogram(
            "coati_request_seconds", "from arrival to the end", buckets=_SECONDS, **own
        )
        self.first = Histogram(
            "coati_first_token_seconds", "from arrival to the first token", buckets=_SECONDS, **own
        )
        Gauge("coati_running_requests", "requests in the batch", **own).set_function(running)
        Gauge("coati_waiting_requests", "requests in the queue", **own).set_function(waiting)

    def joined(self, prompt_tokens: int, seconds: float) -> None:
        """A prompt of ``prompt_tokens`` has its first token, ``seconds`` after it arrived."""
        self.prompts.inc(prompt_tokens)
        self.generated.inc()
        self.first.observe(seconds)

    def outcome(self, name: str, seconds: float | None = None) -> None:
        """A request ended as ``name``, ``seconds`` after it arrived; None: it was refused."""
        self.requests.labels(name).inc()
        if seconds is not None:
            self.seconds.observe(seconds)

    def text(self) -> bytes:
        """What a Prometheus server scrapes."""
        return generate_latest(self.registry)
