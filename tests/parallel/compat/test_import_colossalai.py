"""ColossalAI's known noise does not reach the user; what is not known does."""

import subprocess
import sys
import warnings
from pathlib import Path

from coati.parallel.compat.import_colossalai import silence_known_noise

TRAIN = """
from coati.parallel.boost import boost
from coati.parallel.launch import launch
from coati.parallel.plugins import ParallelOptions
from tests.tiny import tiny_llama

launch()
for plugin in ("gemini", "3d"):
    boost(tiny_llama(), ParallelOptions(plugin=plugin, precision="bf16", batch_size=2))
import warnings
warnings.warn("something new", UserWarning)
print("done")
"""


def test_importing_and_boosting_say_nothing_of_their_own():
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run(
        [sys.executable, "-c", TRAIN], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == "done\n", ran.stdout + ran.stderr
    assert "something new" in ran.stderr
    assert not [line for line in ran.stderr.splitlines() if "something new" not in line], ran.stderr


def test_only_listed_warnings_are_held_back():
    with warnings.catch_warnings(record=True) as seen:
        silence_known_noise()
        warnings.simplefilter("always")  # as torch does around some of its own
        warnings.warn("Please install apex from source, says ColossalAI", UserWarning, stacklevel=1)
        warnings.warn("Please install apes", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["Please install apes"]


WITHOUT_BITSANDBYTES = """
import importlib.util
import sys

assert "bitsandbytes" not in sys.modules


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] == "bitsandbytes"
        return None if hidden else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
from coati.parallel.compat.import_colossalai import import_colossalai

import_colossalai()
import peft
import transformers

assert not [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]
assert importlib.util.find_spec("bitsandbytes") is None
from colossalai.nn.optimizer import GaLoreAdamW8bit, HybridAdam

try:
    GaLoreAdamW8bit([], lr=1.0)
except ImportError as error:
    print(error)
"""


def test_colossalai_imports_where_bitsandbytes_is_not_installed():
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", WITHOUT_BITSANDBYTES]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "this optimizer needs bitsandbytes, which is not installed\n", ran.stderr
