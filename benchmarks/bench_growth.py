"""How cost grows: time and memory of a training step with length, vocabulary and model size, and of
a preparation with its rows; fitted, explained and drawn.

SFT steps of a Llama in fp32 through the library's engine (plugin ddp), each point in a process of
its own: the median time of a few steps, what their parts take (op_classes.py), and the highest
resident set beyond what the process had before the model. Three things are printed for each:

  exponent   b of cost = a x^b, over all points
  curve      constant + linear x + quadratic x^2, none negative; from it follows where the cost is
             linear (both other terms at most a tenth of it)
  why        the parts of a step that the constant and the quadratic term come from

    python benchmarks/bench_growth.py [length vocabulary size rows] [--output F] [--picture F.svg]

Axes that F has from earlier runs on this machine are kept, and drawn with the new ones.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import growth_fit, op_classes, work_floors  # noqa: E402
from benchmarks.bench_memory import resident  # noqa: E402
from benchmarks.growth_picture import draw  # noqa: E402
from benchmarks.profile_step import Timed, split  # noqa: E402
from benchmarks.sft_case import MODEL, block_weights  # noqa: E402

STEPS = 3  # timed at each point, after one that is not
TOKENS = 1024  # of a step, where the length does not vary
SUPERVISED = 4  # one token in so many
LONG = {"max_position_embeddings": 16384}


class Point(NamedTuple):
    """One measurement: its place on the axis, and what is run there."""

    x: float
    model: dict
    rows: int
    length: int


def lengths() -> list[Point]:
    """One row of ever more tokens."""
    return [Point(n, MODEL | LONG, 1, n) for n in (128, 256, 512, 1024, 2048, 4096, 8192)]


def vocabularies() -> list[Point]:
    names = (8192, 16384, 32768, 65536, 131072)
    return [Point(n, MODEL | {"vocab_size": n}, 4, TOKENS // 4) for n in names]


def sizes() -> list[Point]:
    """Models of more and wider layers; x counts the blocks' weights, in millions."""
    found = []
    for layers, hidden in ((4, 128), (5, 256), (6, 384), (8, 512), (12, 640), (16, 768)):
        model = MODEL | {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 128,
            "intermediate_size": hidden * 8 // 3,
            "vocab_size": 16384,
        }
        found.append(Point(block_weights(model) / 1e6, model, 4, TOKENS // 4))
    return found


ROWS = (2000, 8000, 32000, 96000)  # of preparations
MACHINE = ("cpu", "cores", "threads", "torch")  # figures of other ones are not mixed
# axis -> what x is, and the points
AXES: dict[str, tuple[str, Callable[[], list[Point]]]] = {
    "length": ("tokens of the row", lengths),
    "vocabulary": ("entries of the vocabulary", vocabularies),
    "size": ("million weights of the blocks", sizes),
}
KNOWN = (*AXES, "rows")


class NoRates:
    """In the place of MachineRates: growth needs no rate of the machine."""

    def measure(self) -> None:
        pass


def measured(point: Point, steps: int = STEPS) -> dict[str, Any]:
    """In this process: seconds, MiB, and seconds of each part."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks import preference_ways, profile_case
    from coati.parallel.launch import launch
    from coati.trainer import SFTTrainer

    launch()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    torch.manual_seed(0)
    engine = preference_ways.boosted(LlamaForCausalLM(LlamaConfig(**point.model)))
    generator = random.Random(0)
    rows = [
        [generator.randrange(3, point.model["vocab_size"]) for _ in range(point.length)]
        for _ in range(point.rows)
    ]
    batch = profile_case.sft_batch(rows, [point.length // SUPERVISED] * point.rows)
    timed = Timed(steps, 1, point.model["vocab_size"], NoRates(), warm_up=1)
    # The profiled step comes last, and what its events take is not the step's.
    timed.plans.sort(key=["warm", "plain", "profiled"].index)
    peak = 0
    begin = timed.begin

    def begin_and_look(kind: str = "step") -> None:
        nonlocal peak
        peak = peak or (timed.plans[timed.taken.get(kind, 0)] == "profiled") * resident("VmHWM")
        begin(kind)

    timed.begin = begin_and_look  # type: ignore[method-assign]
    with op_classes.marked():
        profile_case.train(engine, SFTTrainer(engine=engine), batch, timed)
    seconds = median(step["seconds"] for step in timed.plain["step"])
    return {
        "x": point.x,
        "seconds": seconds,
        "mib": (peak - before) / 2**20,
        "parts": split(seconds, timed.found["step"][0].parts),
        "parameters": work_floors.parameters(point.model),
    }


def _measured(point: Point, steps: int) -> dict[str, Any]:
    return measured(point, steps)


def in_fork(point: Point, steps: int) -> dict[str, Any]:
    """The same in a copy of this process, which has imported everything and computed nothing: its
    memory is the point's own. Raises ValueError if the copy fails."""
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=fork) as pool:
        try:
            return pool.submit(_measured, point, steps).result()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"the step at {point.x:g} failed: {why}") from error


def of_steps(axis: str, steps: int) -> list[dict[str, Any]]:
    points = []
    for point in AXES[axis][1]():
        points.append(in_fork(point, steps))
        print(
            f"  {axis} {point.x:g}: {points[-1]['seconds']:.3f} s, {points[-1]['mib']:.0f} MiB",
            flush=True,
        )
    return points


def of_rows(counts: tuple[int, ...] = ROWS) -> list[dict[str, Any]]:
    """Preparations by bench_data_scale.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        program = Path(__file__).with_name("bench_data_scale.py")
        words = [sys.executable, str(program), "--output", str(output), "--sizes"]
        done = subprocess.run([*words, *map(str, counts)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{program.name} ended with {done.returncode}\n{done.stderr}")
        print(done.stdout, end="", flush=True)
        rows = json.loads(output.read_text(encoding="utf-8"))["sizes"]
    return [
        {
            "x": row["rows"],
            "seconds": row["seconds"],
            "mib": row["peak_resident_mib"] - row["resident_mib_before"],
            "processor_seconds": row["cpu_seconds"],
        }
        for row in rows
    ]


def growth(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Exponent and curve of time and memory, and of the time of every part that ever matters."""
    xs = [point["x"] for point in points]
    found: dict[str, Any] = {"points": points}
    for name in ("seconds", "mib"):
        ys = [max(point[name], 1e-9) for point in points]
        found[name] = _grown(xs, ys)
    found["parts"] = {}
    for part in points[0].get("parts", {}):
        ys = [point["parts"][part] for point in points]
        if max(y / point["seconds"] for y, point in zip(ys, points, strict=True)) > 0.02:
            found["parts"][part] = _grown(xs, [max(y, 1e-9) for y in ys])
    return found


def _grown(xs: list[float], ys: list[float]) -> dict[str, Any]:
    fitted = growth_fit.curve(xs, ys)
    return {
        "exponent": growth_fit.exponent(xs, ys),
        "last_exponent": growth_fit.exponent(xs[-2:], ys[-2:]),
        **fitted._asdict(),
        "linear_from": fitted.linear_from(),
        "linear_to": fitted.linear_to(),
        "largest_error": growth_fit.largest_error(xs, ys, fitted),
        "ys": ys,
    }


def explained(axis: str, what: str, found: dict[str, Any]) -> list[str]:
    """The growth in words; every number in it is measured or fitted."""
    points = found["points"]
    last = points[-1]
    lines = [f"{axis} ({what}), {points[0]['x']:g} to {last['x']:g}:"]
    for name, unit in (("seconds", "s"), ("mib", "MiB")):
        one = found[name]
        lines.append(
            f"  {'time' if unit == 's' else 'memory'} grows as x^{one['exponent']:.2f} (between "
            f"the last two points x^{one['last_exponent']:.2f}): {one['constant']:.3g} + "
            f"{one['linear']:.3g} x + {one['quadratic']:.3g} x^2 {unit}, within "
            f"{one['largest_error']:.0%}; {_where(one, points)}"
        )
    lines += _why(found)
    if "parameters" in last:
        held = [16 * point["parameters"] / 2**20 for point in points]
        lines.append(
            f"  of the memory, weights, gradients and AdamW's moments (16 bytes a parameter) are "
            f"{held[0]:.0f} of {points[0]['mib']:.0f} MiB at {points[0]['x']:g}, {held[-1]:.0f} of "
            f"{last['mib']:.0f} at {last['x']:g}"
        )
    return lines


def _where(one: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """Where it is linear, within what was measured."""
    low = one["linear_from"]
    high = one["linear_to"]
    first = points[0]["x"]
    last = points[-1]["x"]
    start = "from the first point on" if low <= first else f"from {growth_fit.plain(low)} on"
    if low > last:
        start = "nowhere here, as the constant is more than a tenth everywhere"
        if not math.isinf(low):
            start += f" (it would be from {growth_fit.plain(low)} on)"
    end = "to the last point" if high >= last else f"up to {growth_fit.plain(high)}"
    if high < first:
        return "linear nowhere here, as the quadratic term is more than a tenth everywhere"
    if high < min(low, last):
        until = "everywhere" if low > last else f"up to {growth_fit.plain(low)}"
        return (
            f"linear nowhere here: the constant is more than a tenth {until}, the quadratic term "
            f"from {growth_fit.plain(high)} on"
        )
    return f"linear {start}" + ("" if low > last and high >= last else f", {end}")


def _why(found: dict[str, Any]) -> list[str]:
    """Which parts the constant and the quadratic term of the time are made of."""
    parts = found["parts"]
    points = found["points"]
    if not parts:
        return []
    lines = []
    for term, power, point in (("constant", 0, points[0]), ("quadratic", 2, points[-1])):
        whole = found["seconds"][term] * point["x"] ** power
        if whole < 0.02 * point["seconds"]:
            continue
        shares = {part: one[term] * point["x"] ** power for part, one in parts.items()}
        named = sorted(shares, key=lambda part: -shares[part])[:3]
        said = ", ".join(
            f"{part} {shares[part]:.3f} s" for part in named if shares[part] > 0.05 * whole
        )
        lines.append(
            f"  the {term} term is {whole / point['seconds']:.0%} of a step at {point['x']:g} "
            f"({whole:.3f} s), by part: {said or 'no part alone'}"
        )
    fastest = max(parts, key=lambda part: parts[part]["last_exponent"] * _matters(parts, part))
    first, last = (parts[fastest]["ys"][i] / points[i]["seconds"] for i in (0, -1))
    lines.append(
        f"  the part that grows fastest is {fastest}, x^{parts[fastest]['last_exponent']:.2f} "
        f"between the last two points: {first:.0%} of the first step, {last:.0%} of the last"
    )
    return lines


def _matters(parts: dict[str, Any], part: str) -> bool:
    """Whether it takes a twentieth of each of the last two steps."""
    return all(
        parts[part]["ys"][i] > 0.05 * sum(one["ys"][i] for one in parts.values()) for i in (-2, -1)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(KNOWN)}; all")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed at each point")
    parser.add_argument("--output", help="write the figures as JSON, to those that are there")
    parser.add_argument("--picture", help="write the curves as an SVG")
    args = parser.parse_args()
    if unknown := [axis for axis in args.axes if axis not in KNOWN]:
        parser.error(f"no axis {unknown[0]!r}; there are {', '.join(KNOWN)}")
    args.axes = args.axes or KNOWN
    return args


def kept(output: str | None, about: dict[str, Any]) -> dict[str, Any]:
    """The axes that ``output`` holds already. Raises ValueError if they are of another machine."""
    from coati.utils.json_io import load_json

    if output is None or not Path(output).exists():
        return {}
    before = load_json(output)
    for key in MACHINE:
        if before["machine"][key] != about[key]:
            raise ValueError(
                f"{output} holds figures of {key} {before['machine'][key]!r}, and here it is "
                f"{about[key]!r}; name another file for --output"
            )
    return before["axes"]


def main() -> None:
    args = parse()
    import coati.trainer  # noqa: F401
    from benchmarks.data_case import machine_with_torch
    from coati.parallel.boost import prepare_colossalai
    from coati.utils.json_io import save_json

    about = machine_with_torch()
    axes = kept(args.output, about)
    prepare_colossalai()
    for axis in args.axes:
        points = of_rows() if axis == "rows" else of_steps(axis, args.steps)
        what = "rows of a preparation" if axis == "rows" else AXES[axis][0]
        axes[axis] = growth(points) | {"what": what, "load_average": os.getloadavg()[0]}
        print("\n".join(explained(axis, what, axes[axis])), flush=True)
        if args.output:
            save_json({"machine": about, "axes": axes}, args.output)
    if args.picture:
        drawn = draw({axis: axes[axis] for axis in KNOWN if axis in axes})
        Path(args.picture).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
