"""In a worker: a step of plugin ddp, and the way out of the group."""

import os

import torch


def leave_after_a_step() -> bool:
    """True when the group has been left."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch, shut_down
    from coati.parallel.options import ParallelOptions
    from coati.trainer.sft import SFTObjective
    from tests.tiny import tiny_llama

    launch()
    engine = boost(tiny_llama(), ParallelOptions(plugin="ddp"), lr=1e-3)
    ids = torch.arange(8).view(1, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).bool(), "labels": ids}
    engine.train_step([batch], SFTObjective())
    shut_down(wait=True)
    return not torch.distributed.is_initialized()
