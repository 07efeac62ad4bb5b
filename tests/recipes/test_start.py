"""What a training run loads before it knows that it is needed."""

import subprocess
import sys

STARTED = """
import sys
import coati.recipes.offline, coati.recipes.rl, coati.recipes.run
# bitsandbytes, which peft and ColossalAI import, loads torch's compiler, whose processes are to be
# held back first (parallel/compat/import_colossalai.py).
late = ("peft", "bitsandbytes", "colossalai", "torch._inductor.compile_fx")
late += ("vllm", "ray", "wandb", "tensorboard", "trackio")
print([name for name in late if name in sys.modules])
"""


def test_recipes_are_imported_without_adapters_and_compilers():
    done = subprocess.run(
        [sys.executable, "-c", STARTED], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["[]"], done.stderr[-2000:]
