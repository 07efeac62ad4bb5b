"""Generation: one decoder with continuous batching, its KV cache, sampling and random numbers."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Sampling": "sampling",
        "generate": "loop",
        "generate_streaming": "loop",
    },
)
