"""ColossalAI on machines without an accelerator: gloo, system memory, plain torch in place of CUDA
kernels."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"CPU_PATCHES": "patches", "apply": "patches"}
)
