"""The responses of one collect phase, kept until they have been trained on, and the order in which
that happens."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BufferItem": "buffer",
        "NaiveExperienceBuffer": "buffer",
        "make_experience_batch": "buffer",
        "split_experience_batch": "buffer",
        "windows_per_episode": "batch_sizes",
    },
)
