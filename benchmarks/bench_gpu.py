"""The library on one NVIDIA GPU, beside figures that others have published: minutes, random
weights, mock tokens.

Each item is a process of its own that is stopped at --cap seconds, and is in the JSON of --output
as soon as it has ended. An item stopped at its cap keeps what it had measured; one that was not
reached, or could not run here, is named with the reason. --list names the items in their order;
--tiny runs each of them on a CPU with models of nothing: a test of this script.

    python benchmarks/bench_gpu.py [--only NAME]... [--output results.json]
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_models as models  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TAIL = 2000  # characters of the output of an item that fell over
H100 = "one H100"
KEYS = {  # what the table shows of an item, and how
    "ok": "{}",
    "difference": "difference {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "samples_per_second": "{:.2f} samples/s",
    "model_tflops": "{:.0f} TFLOP/s",
    "mfu": "MFU {:.0%}",
    "peak_gib": "peak {:.2f} GiB",
    "peak_mb": "peak {:,.2f} MB",
    "step_seconds": "{:.3f} s a step",
    "seconds": "{:.2f} s",
    "megabytes": "{:.0f} MB",
    "freed_mb": "{:.0f} MB freed",
}


@dataclass(frozen=True)
class Item:
    """``work``: "module:function" of this folder, called with a report, ``tiny`` and ``settings``.
    ``published``: others' figures by the name of ours, and on what."""

    name: str
    work: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    cap_s: float | None = None  # instead of --cap


def _dpo_7b(pairs: int, peak: float) -> Item:
    settings = {"shape": models.LLAMA2_7B, "pairs": pairs, "length": 2048, "plugin": "zero2_cpu"}
    published = {"peak_mb": (peak, "ColossalChat, one H800")}
    return Item(f"dpo_7b_zero2_cpu_batch{pairs}", "gpu_training:dpo", settings, published)


def _sft(name: str, published: Mapping[str, tuple[float, str]], **settings: Any) -> Item:
    return Item(name, "gpu_training:sft", settings, published)


def _ppo(name: str, policy: models.Shape, prompt: int, new: int, rate: float, where: str) -> Item:
    settings = {"policy": policy, "critic": models.OPT_350M, "prompts": 32}
    settings |= {"prompt": prompt, "new": new}
    published = {"samples_per_second": (rate, where)}
    return Item(name, "gpu_online:ppo", settings, published)


PARITY = ("ddp", "zero2", "zero2_cpu", "gemini")  # beside plain PyTorch
ITEMS = (
    # nvcc is slow: every item after it uses what this one compiles
    Item("kernels", "gpu_parity:kernels", cap_s=100),
    *(Item(f"parity_{plugin}", "gpu_parity:parity", {"plugin": plugin}) for plugin in PARITY),
    _sft(
        "lora_sft_llama3_8b",
        {"tokens_per_second": (12473, H100), "model_tflops": (402, H100)},
        shape=models.LLAMA3_8B,
        rows=2,
        length=4096,
        keeps_gib=100,
    ),
    Item(
        "dpo_lora_qwen25_7b",
        "gpu_training:dpo",
        {"shape": models.QWEN25_7B, "pairs": 1, "length": 2048, "lora": True},
        {"peak_gb": (19.08, "one GPU")},
    ),
    Item(
        "rl_step_qwen3_4b",
        "gpu_training:rl_step",
        {"shape": models.QWEN3_4B, "length": 16384},
        {"tokens_per_second": (6230, "one GPU"), "peak_gib": (23.3, "one GPU")},
    ),
    Item(
        "rollouts_qwen3_0.6b",
        "gpu_online:rollouts",
        {"shape": models.QWEN3_06B, "prompts": 64, "new": 96},
    ),
    _dpo_7b(2, 49873.90),
    _dpo_7b(4, 60998.22),
    _ppo("ppo_opt_1.3b", models.OPT_13B, 256, 256, 3.13, "ColossalChat, one A100 80 GB"),
    _sft(
        "sft_qwen3_0.6b",
        {"tokens_per_second": (26000, H100), "peak_gib": (31.7, H100)},
        shape=models.QWEN3_06B,
        rows=1,
        length=8192,
        lora=False,
    ),
    _sft(
        "lora_sft_qwen25_7b",
        {"tokens_per_second": (14110, H100)},
        shape=models.QWEN25_7B,
        rows=2,
        length=4096,
        keeps_gib=100,
    ),
    _sft(
        "qlora_sft_llama3_8b",
        {"peak_gb": (6.0, "from")},
        shape=models.LLAMA3_8B,
        rows=1,
        length=512,
        quantize="nf4",
        keeps_gib=1000,  # always checkpointing: the memory counts
    ),
    _ppo("ppo_opt_125m", models.OPT_125M, 384, 128, 118.42 / 8, "ColossalChat, a process of 8"),
    *(
        Item(f"publish_{sync}", "gpu_servers:publish", {"sync": sync})
        for sync in ("disk", "http", "nccl", "ipc")
    ),
    *(
        Item(f"server_{engine}", "gpu_servers:serve", {"engine": engine})
        for engine in ("vllm", "own")
    ),
    Item("sleep", "gpu_servers:sleep"),
)
BY_NAME = {item.name: item for item in ITEMS}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=BY_NAME, metavar="NAME", help="repeatable"
    )
    parser.add_argument("--list", action="store_true", help="name the items and do nothing")
    parser.add_argument("--tiny", action="store_true", help="models of nothing, on a CPU too")
    parser.add_argument("--cap", type=float, default=45, help="seconds of an item")
    parser.add_argument(
        "--budget", type=float, default=520, help="seconds after which no item begins any more"
    )
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/gpu_NAME.json, of the GPU's name"
    )
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def run_item(item: Item, path: Path, tiny: bool, cap_s: float) -> dict[str, Any]:
    """Of ``item``, in this process: its figures with a ``status``, which ``path`` has too."""
    from benchmarks.gpu_item import Report

    report = Report(path, cap_s)
    module, _, function = item.work.partition(":")
    began = time.monotonic()
    try:
        getattr(import_module(f"benchmarks.{module}"), function)(report, tiny, **item.settings)
        report.add(status="done")
    except models.NotHere as error:
        report.add(status="skipped", reason=str(error))
    except BaseException as error:
        first = (str(error).strip().splitlines() or [""])[0]
        report.add(status="failed", reason=f"{type(error).__name__}: {first}")
        raise
    finally:
        report.add(item_seconds=time.monotonic() - began)
    return report.figures


def worker_command(name: str, path: Path, tiny: bool, cap_s: float) -> list[str]:
    command = [sys.executable, __file__, "--worker", name, str(path), "--cap", str(cap_s)]
    return [*command, *["--tiny"] * tiny]


def start_item(item: Item, folder: Path, tiny: bool, cap_s: float) -> dict[str, Any]:
    """:func:`run_item` in a process of its own, which is ended at its cap with all it started."""
    from coati.utils.json_io import load_json

    path = folder / f"{item.name}.json"
    command = worker_command(item.name, path, tiny, cap_s)
    began = time.monotonic()
    stopped = False
    with open(folder / f"{item.name}.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(cap_s)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            end_group(process)
        log.seek(0)
        tail = log.read()[-TAIL:]
    found = load_json(path) if path.exists() else {}
    found["process_seconds"] = time.monotonic() - began
    if stopped and found.get("status") != "done":
        found |= {"status": "capped", "reason": f"stopped at its cap of {cap_s:.0f} s"}
    elif "status" not in found:
        found |= {"status": "failed", "reason": ending(process.returncode)}
    return found | ({"output": tail} if found["status"] in ("failed", "capped") else {})


def ending(code: int) -> str:
    """What the exit code of an item that said nothing means."""
    if code != -signal.SIGKILL:
        return f"ended with code {code}"
    return "killed by the system, which had no host memory left for it, most likely"


def end_group(process: subprocess.Popen) -> None:
    """End ``process`` and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def beside_published(item: Item, found: dict[str, Any]) -> dict[str, Any]:
    """``found`` with the published figures and ours as a share of them."""
    if "peak_gib" in found:  # as others wrote theirs
        mib = found["peak_gib"] * 1024
        found |= {"peak_mb": mib, "peak_gb": mib * 2**20 / 1e9}
    published = {
        name: {"value": value, "on": where, "ours_is": found[name] / value}
        for name, (value, where) in item.published.items()
        if name in found
    }
    return found | ({"published": published} if published else {})


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from coati.utils.environment import environment

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        gpus = []
    about = environment()
    kept = ("coati", "commit", "python", "packages", "platform", "cpus", "memory_gib", "command")
    return {"gpus": gpus, "cuda": torch.version.cuda, **{name: about[name] for name in kept}}


def line_of(name: str, found: dict[str, Any]) -> str:
    """An item's row of the table."""
    if found["status"] in ("skipped", "not reached"):
        return f"{name:24s} {found['status']}: {found['reason']}"
    parts = [
        text.format(found[key])
        for key, text in KEYS.items()
        if key in found and not isinstance(found[key], dict) and key != "peak_mb"
    ]
    for mode in ("greedy", "sampled"):
        if mode in found:
            parts.append(f"{mode} {found[mode]['ratio']:.2f} x transformers' generate")
    for key, other in found.get("published", {}).items():
        text = KEYS.get(key, "{:,.2f} " + key.removeprefix("peak_").upper()).format(other["value"])
        parts.append(f"[{text} on {other['on']}: {other['ours_is']:.2f} of it]")
    if "reason" in found:
        parts.insert(0, f"{found['status']}: {found['reason']}")
    return f"{name:24s} {', '.join(parts) or found['status']}"


def save(path: Path | None, about: dict[str, Any], found: dict[str, Any], tiny: bool) -> None:
    from coati.utils.json_io import save_json

    if path is not None:
        save_json({"tiny": tiny, "machine": about, "items": found}, path)


def main() -> None:
    args = parse()
    if args.worker:
        name, path = args.worker
        run_item(BY_NAME[name], Path(path), args.tiny, args.cap)
        return
    if args.list:
        print("\n".join(BY_NAME))
        return
    import torch

    ends = time.monotonic() + args.budget
    on_gpu = torch.cuda.is_available()
    about = machine()
    output = args.output
    if output is None and on_gpu and not args.tiny:
        name = about["gpus"][0].partition(",")[0] if about["gpus"] else "unknown"
        slug = re.sub(r"\W+", "_", name.lower())
        output = RESULTS / f"gpu_{slug}.json"
    where = "; ".join(about["gpus"]) or "no GPU"
    more = " (models of nothing: these figures mean nothing)" if args.tiny else ""
    print(f"{where}, torch {torch.__version__}{more}", flush=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for item in ITEMS:
            if args.only and item.name not in args.only:
                continue
            cap = item.cap_s or args.cap
            if not (on_gpu or args.tiny):
                row: dict[str, Any] = {"status": "not reached", "reason": "no NVIDIA GPU"}
            elif time.monotonic() > ends:
                row = {"status": "not reached", "reason": f"the {args.budget:.0f} s were over"}
            else:
                row = start_item(item, Path(folder), args.tiny, 6 * cap if args.tiny else cap)
            found[item.name] = row if args.tiny else beside_published(item, row)
            print(line_of(item.name, found[item.name]), flush=True)
            save(output, about, found, args.tiny)
    if not (on_gpu or args.tiny):
        sys.exit("bench_gpu.py: needs an NVIDIA GPU; --tiny shows on a CPU that every item runs")
    fallen = [name for name, row in found.items() if row["status"] == "failed"]
    if fallen:
        sys.exit(f"bench_gpu.py: fell over: {', '.join(fallen)}")


if __name__ == "__main__":
    main()
