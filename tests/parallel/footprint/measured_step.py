"""Run as a program: optimizer steps of one configuration, and the most that weights and PyTorch's
allocator held meanwhile, in bytes. In a process of its own, where no garbage of others is freed."""

import json
import sys
from typing import Any

import torch

from coati.parallel.boost import boost, prepare_colossalai
from coati.parallel.engine import Engine
from coati.parallel.launch import launch
from coati.parallel.options import ParallelOptions
from coati.trainer.sft import SFTObjective


def engine_of(config: dict[str, Any], options: ParallelOptions) -> Engine:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    return boost(model, options)


def peak_of_steps(engine: Engine, rows: int, length: int) -> int:
    """The weights, and the highest sum of PyTorch's own record of every allocation and release of
    two steps, the second of which has the optimizer states of the first."""
    ids = torch.randint(3, 300, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        for _ in range(2):
            engine.train_step([batch], SFTObjective())
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    held = peak = sum(parameter.nbytes for parameter in engine.module.parameters())
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    launch(seed=0)
    prepare_colossalai()
    engine = engine_of(asked["config"], ParallelOptions(**asked["options"]))
    print(json.dumps(peak_of_steps(engine, asked["rows"], asked["length"])))
