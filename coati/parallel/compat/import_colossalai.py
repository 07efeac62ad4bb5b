"""ColossalAI, imported late and without the noise that tells a user nothing.

Only the messages listed here are held back. A warning that is not listed passes.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from coati.utils.packages import check_packages

# (start of the message as a regular expression, why it tells the user nothing)
KNOWN_WARNINGS = (
    (r"Please install the latest tensornvme", "offloading to NVMe is not offered"),
    (r"Please install apex from source", "torch's own norms are used"),
    (
        r"`TorchScript` support for functional optimizers is deprecated",
        "raised by torch on importing its own module",
    ),
    (r"`torch\.jit\.script` is deprecated", "upstream's spelling of a torch call"),
    (r"TypedStorage is deprecated", "upstream's spelling of a torch call"),
    (
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        "likewise",
    ),
    (r"`broadcast_buffers` is deprecated", "a keyword that ColossalAI passes on"),
    (
        r"More than one kernel is available, loading the kernel with the highest priority",
        "an internal choice",
    ),
)
# (logger, start of the message)
KNOWN_LOG_LINES = (
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast"),
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
    ),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    ("colossalai", "enable_async_reduce sets pin_memory=True"),
    ("colossalai", "The plugin will control the accelerator"),
    ("colossalai", "You have enabled LoRa training"),
    ("colossalai", "The sp_size will be the same as tp_size"),
    ("colossalai", "Use Zero Optimizer when data parallel size is 1"),
    ("colossalai", "Distributed environment is initialized"),
)
# ColossalAI logs where a message comes from as a message of its own, before it.
LOCATION = re.compile(r"\S+\.py:\d+ \S+")
# (module that prints, start of what it prints)
KNOWN_PRINTS = (
    ("colossalai.zero.gemini.memory_tracer.memstats_collector", "finish_collection"),
    ("colossalai.shardformer.policies.qwen2", "self.shard_config.enable_flash_attention"),
)


class _DropKnown(logging.Filter):
    """Holds back the known lines of one logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage().strip()
        if record.name == "colossalai" and LOCATION.fullmatch(text):
            return False
        return not any(
            record.name == logger and text.startswith(start) for logger, start in KNOWN_LOG_LINES
        )


def silence_known_noise() -> None:
    """Hold back the known warnings and log lines of ColossalAI and of what it imports, for the life
    of the process."""
    for message, _ in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger in {logger for logger, _ in KNOWN_LOG_LINES}:
        if not any(isinstance(known, _DropKnown) for known in logging.getLogger(logger).filters):
            logging.getLogger(logger).addFilter(_DropKnown())
    if getattr(warnings.showwarning, "knows_coati", False):
        return
    show = warnings.showwarning
    known = re.compile("|".join(message for message, _ in KNOWN_WARNINGS))

    def show_unknown(message, *args, **kwargs) -> None:
        # torch raises some of these under its own "always" filter, which the filters above cannot
        # overrule.
        if not known.match(str(message)):
            show(message, *args, **kwargs)

    show_unknown.knows_coati = True  # type: ignore[attr-defined]
    warnings.showwarning = show_unknown


def _print_without(start: str):
    def quiet_print(*args, **kwargs) -> None:
        if not (args and str(args[0]).startswith(start)):
            print(*args, **kwargs)

    return quiet_print


def _import_without(module: str, start: str) -> None:
    """Import ``module``, which writes a line beginning with ``start`` to standard error; other
    lines pass."""
    kept = io.StringIO()
    with contextlib.redirect_stderr(kept):
        import_module(module)
    for line in kept.getvalue().splitlines():
        if not line.startswith(start):
            print(line, file=sys.stderr)


class _NoOptimizer:
    """In the place of bitsandbytes' optimizers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("this optimizer needs bitsandbytes, which is not installed")


@contextlib.contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Where bitsandbytes is not installed, what ColossalAI imports of it can be imported inside the
    block: the class of optimizers that are not used here (nn/optimizer/galore.py,
    distributed_galore.py, and galore_torch). The package itself stays missing for whoever looks."""
    name = "bitsandbytes.optim.optimizer"
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield
        return
    module: Any = ModuleType(name)
    module.Optimizer2State = _NoOptimizer
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def import_colossalai() -> ModuleType:
    """``colossalai`` with its booster loaded and its known noise held back. Takes some seconds the
    first time. Raises ValueError as :func:`~coati.utils.packages.check_packages`."""
    check_packages()
    # Importing it makes torch start a pool of compiler processes on every rank; nothing here is
    # compiled.
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        config: Any = import_module("torch._inductor.config")
        config.compile_threads = 1
    silence_known_noise()
    _import_without("torch.utils.cpp_extension", "No CUDA runtime is found")
    with _without_bitsandbytes():
        colossalai = import_module("colossalai")
        import_module("colossalai.booster.plugin")
    for module, start in KNOWN_PRINTS:
        printing: Any = import_module(module)
        printing.print = _print_without(start)
    return colossalai
