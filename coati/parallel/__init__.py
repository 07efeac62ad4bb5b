"""Everything that knows ColossalAI: plugins, its behavior without an accelerator, the engine,
checkpoints."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "PLUGINS": "plugins",
        "ParallelOptions": "plugins",
        "check_options": "plugin_checks",
        "prepare_colossalai": "boost",
        "Engine": "engine",
        "save_checkpoint": "checkpoint",
        "save_model": "weights",
    },
)
