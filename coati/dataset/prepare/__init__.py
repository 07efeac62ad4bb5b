"""Resumable sharded preparation on all cores."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "prepare_dataset": "preparation",
    },
)
