"""The experience of one collect phase, and the order in which it is trained on."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BufferItem": "buffer",
        "NaiveExperienceBuffer": "buffer",
        "make_experience_batch": "buffer",
        "split_experience_batch": "buffer",
        "optimizer_steps_per_pass": "batch_sizes",
    },
)
