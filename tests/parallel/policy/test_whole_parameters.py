"""Parameters that --tp leaves whole stay the same on every process.

A gradient that misses the parts of other processes' heads moves them apart. Losses show it late,
and the norm of all gradients hardly at all: those of a head's norm are small beside the others.
"""

import pytest
import torch
import torch.distributed as dist

from coati.parallel.families import check_family
from coati.parallel.options import ParallelOptions
from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run

CHANGES = {
    "qwen3": {},
    "glm4_moe": {"use_qk_norm": True},
    "phi": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
}


def differing() -> dict[str, list[str]]:
    """In a worker: of each family the names of whole parameters that differ after two steps."""
    from colossalai.tensor.d_tensor.api import (
        is_customized_distributed_tensor,
        is_distributed_tensor,
    )

    from coati.parallel.launch import launch
    from tests.models_table import cells
    from tests.models_table.families import BY_TYPE, GROUPED, Family

    launch(seed=0, timeout_s=60)
    column = next(column for column in cells.COLUMNS if column.title == "3d --tp 2")
    found = {}
    for name, changes in CHANGES.items():
        known = BY_TYPE.get(name)
        config = known.config if known else GROUPED | {"pad_token_id": 0}
        engine = cells.boosted(Family(name, name, config | changes), column)
        pad = getattr(engine.module.config, "pad_token_id", None) or 0
        for step in range(2):
            engine.train_step([cells.rows(step, pad)], cells._CrossEntropy())
        found[name] = []
        for own, parameter in engine.module.named_parameters():
            if is_distributed_tensor(parameter) or is_customized_distributed_tensor(parameter):
                continue
            both = [torch.empty_like(parameter.data) for _ in range(2)]
            dist.all_gather(both, parameter.data.contiguous())
            if not torch.equal(*both):
                found[name].append(own)
    return found


if transformers_major() >= 5:

    def test_whole_parameters_stay_the_same_on_every_process():
        assert run(2, f"{__name__}:differing") == [{name: [] for name in CHANGES}] * 2

    def test_doge_is_refused_by_name():
        from transformers import DogeConfig

        with pytest.raises(ValueError, match="--tp is not possible with doge models: its mask"):
            check_family(DogeConfig(), ParallelOptions(plugin="3d", tp=2, batch_size=2))
