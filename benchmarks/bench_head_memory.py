"""Peak memory of one forward + backward of the vocabulary head, beside full logits + cross_entropy.

S 512 positions, vocabulary 151,936 (Qwen2's), fp32, on a CPU; each way in a process of its own,
measured twice:

  resident   the highest resident set of the process during the pass, minus the resident set just
             before it. Linux's high-water mark (VmHWM) is set back right before the pass, so
             imports and inputs do not count; nor does memory that is asked for and never touched.
  allocator  the same from PyTorch's own record of every allocation and release: no noise, no other
             process matters. The tests assert this one.

Both include the gradient of the vocabulary's weight, which no way of computing it avoids: the wider
the hidden states, the closer the two ways come. Beside it stands the memory without that gradient
(a frozen head, as under LoRA).

    python benchmarks/bench_head_memory.py [--hidden 256 512 896] [--output results.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from coati.models.head import Head  # noqa: E402

POSITIONS = 512
VOCABULARY = 151_936


class Bare(nn.Module):
    """A model that is its head: hidden states in, logits (or what a Head makes of them) out."""

    def __init__(self, hidden: int, vocabulary: int):
        super().__init__()
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def case(
    hidden: int, positions: int = POSITIONS, vocabulary: int = VOCABULARY, frozen: bool = False
):
    """(model, hidden states (1, S + 1, H), labels (1, S + 1)): all S shifted labels are
    supervised."""
    torch.manual_seed(0)
    model = Bare(hidden, vocabulary)
    model.lm_head.requires_grad_(not frozen)
    states = torch.randn(1, positions + 1, hidden, requires_grad=True)
    return model, states, torch.randint(0, vocabulary, (1, positions + 1))


def full_logits(model: nn.Module, states: Tensor, labels: Tensor) -> None:
    """The textbook way: all logits, shifted cross_entropy."""
    logits = model(states)
    F.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()


def head(model: nn.Module, states: Tensor, labels: Tensor) -> None:
    switch = Head.install(model)
    switch.set(labels)
    flat = model(states)
    (-flat.sum() / flat.numel()).backward()


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], None]] = {
    "full_logits": full_logits,
    "head": head,
}


def allocator_peak(run: Callable[[], None]) -> int:
    """Bytes: the most that PyTorch had allocated during ``run`` beyond what it had before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_peak(run: Callable[[], None]) -> int:
    """Bytes: growth of the resident set during ``run``, at its highest."""

    def read(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(
            int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)
        )

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def worker(way: str, hidden: int, frozen: bool, measure: str, gradients: str | None) -> None:
    WAYS[way](*case(8, 4, 64))  # thread pools, lazily loaded libraries
    model, states, labels = case(hidden, frozen=frozen)
    peak = {"resident": resident_peak, "allocator": allocator_peak}[measure](
        lambda: WAYS[way](model, states, labels)
    )
    if gradients:
        torch.save({"states": states.grad, "weight": model.lm_head.weight.grad}, gradients)
    print(json.dumps(peak))


def in_own_process(
    way: str, hidden: int, frozen: bool, measure: str, gradients: Path | None = None
) -> int:
    call = ["--worker", way, "--hidden", str(hidden), "--measure", measure]
    call += ["--frozen"] * frozen + (["--gradients", str(gradients)] if gradients else [])
    run = subprocess.run([sys.executable, __file__, *call], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout)


def largest_difference(folder: Path) -> float:
    """Between the two ways' gradients, relative to the largest entry."""
    one, other = (torch.load(folder / f"{way}.pt", weights_only=True) for way in WAYS)
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max()) for k in one)


def compare(hidden: int) -> dict:
    figures: dict = {"hidden": hidden, "weight_gradient_mib": hidden * VOCABULARY * 4 / 2**20}
    with tempfile.TemporaryDirectory() as name:
        for measure in ("resident", "allocator"):
            for frozen in (False, True):
                save = measure == "resident" and not frozen
                peaks = {
                    way: in_own_process(
                        way, hidden, frozen, measure, Path(name) / f"{way}.pt" if save else None
                    )
                    for way in WAYS
                }
                label = f"{measure}{'_frozen' if frozen else ''}"
                figures[label] = {way: peak / 2**20 for way, peak in peaks.items()}
                figures[label]["ratio"] = peaks["head"] / peaks["full_logits"]
        figures["gradient_difference"] = largest_difference(Path(name))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 896])
    parser.add_argument("--output", help="write the figures as JSON")
    for name in ("--worker", "--measure", "--gradients"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.hidden[0], args.frozen, args.measure, args.gradients)
    results = [compare(hidden) for hidden in args.hidden]
    print(
        f"one forward + backward of the head, S {POSITIONS}, vocabulary {VOCABULARY}, fp32; peak "
        "in MiB"
    )
    for row in results:
        for label, what in (
            ("resident", "resident"),
            ("allocator", "allocator"),
            ("resident_frozen", "frozen head"),
        ):
            peak = row[label]
            ways = f"full logits {peak['full_logits']:6.0f}   head {peak['head']:6.0f}"
            print(f"hidden {row['hidden']:4d} {what:12s} {ways}   {peak['ratio']:.0%}")
        print(
            f"hidden {row['hidden']:4d} largest relative difference of a gradient "
            f"{row['gradient_difference']:.1e}"
        )
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
