"""Inference: load any directory that training writes, chat, stream, evaluate, export and serve."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ChatSession": "chat",
        "TextStream": "stream",
        "load": "model_loading",
        "Loaded": "model_loading",
    },
)
