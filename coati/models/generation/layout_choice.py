"""Which layout of linear weights is fastest for decoding on this machine: measured once on the
model's own shapes and kept, so that a resumed run multiplies exactly as the interrupted one did."""

import functools
import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.utils.logging import get_logger
from coati.utils.user_cache import cache_root

logger = get_logger(__name__)

GAIN = 0.9  # of the time of the layers as they are, which a layout must stay below
_TURNS = 5
_AS_IT_IS = "layers"
_known: dict[str, str | None] = {}  # by this process


@functools.cache
def processor() -> str:
    """The name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fastest(layers: Sequence[Any], rows: int, layouts: Mapping[str, Any]) -> str | None:
    """The name of the one of ``layouts`` that multiplies ``rows`` rows with ``layers`` fastest;
    None: the layers as they are.

    Numbers of rows up to the same power of two share one answer.
    """
    if not layouts:
        return None
    rows = 1 << (rows - 1).bit_length()
    layouts = {name: each for name, each in layouts.items() if rows in each.rows}
    shapes = Counter(tuple(layer.weight.shape) for layer in layers)
    case = [
        processor(),
        torch.__version__,
        torch.get_num_threads(),
        rows,
        sorted(layouts),
        sorted(shapes.items()),
    ]
    text = json.dumps(case)
    if text not in _known:
        file = cache_root() / "layouts" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        found = _read(file, layouts)
        if found is None:
            found = _keep(_measured(layers, shapes, rows, layouts), layouts, text, file)
        _known[text] = None if found == _AS_IT_IS else found
    return _known[text]


def _read(file: Path, layouts: Mapping[str, Any]) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())["fastest"]
        return found if found in (_AS_IT_IS, *layouts) else None
    return None


def _keep(found: str, layouts: Mapping[str, Any], case: str, file: Path) -> str:
    """Keep ``found``; what another process has kept meanwhile goes before it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"fastest": found, "case": json.loads(case)}))
        try:
            os.link(temporary, file)
        except FileExistsError:
            kept = _read(file, layouts)
            if kept is None:  # it cannot be read
                os.replace(temporary, file)
            found = kept or found
    except OSError as error:
        logger.info_once(
            f"the fastest layout of weights for decoding cannot be kept ({error}): "
            "a resumed run measures again, and with another layout would sample other tokens"
        )
    finally:
        with suppress(OSError):
            temporary.unlink()
    return found


def _measured(layers: Sequence[Any], shapes: Counter, rows: int, layouts: Mapping[str, Any]) -> str:
    times = dict.fromkeys([_AS_IT_IS, *layouts], 0.0)
    seen: set[tuple[int, ...]] = set()
    for layer in layers:
        shape = tuple(layer.weight.shape)
        if shape not in seen:
            seen.add(shape)
            for name, seconds in _of_shape(layer, rows, layouts).items():
                times[name] += shapes[shape] * seconds
    best = min(times, key=lambda name: times[name])
    found = best if times[best] < GAIN * times[_AS_IT_IS] else _AS_IT_IS
    told = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in times.items())
    logger.debug(f"linear layers of {rows} rows, ms on {processor()}: {told}; kept: {found}")
    return found


def _of_shape(layer: nn.Linear, rows: int, layouts: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the product with ``layer`` in each way; infinite for one that is wrong here."""
    weight = layer.weight.detach()
    hidden = torch.ones(rows, weight.shape[1]).cumsum(dim=1).sin()
    wanted = F.linear(hidden, weight)
    scale = float(wanted.abs().amax())
    ways: dict[str, Callable[[], Tensor]] = {_AS_IT_IS: lambda: F.linear(hidden, weight)}
    for name, layout in layouts.items():
        packed = layout.pack(weight, rows)
        way = functools.partial(layout.product, hidden, packed, weight, None, rows)
        if float((way() - wanted).abs().amax()) <= 1e-4 * scale:
            ways[name] = way
    times = dict.fromkeys([_AS_IT_IS, *layouts], float("inf"))
    for _ in range(_TURNS):
        for name, call in ways.items():
            started = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - started)
    return times
