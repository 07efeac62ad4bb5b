"""What the policy refuses when it meets it: layers that would take a part for the whole."""

import pytest
import torch.distributed as dist
from torch import nn

from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run


def fewer_layers_than_stages() -> str:
    """In a worker: two stages of a model with one layer."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.options import ParallelOptions
    from tests.tiny import tiny_llama

    launch(seed=0, timeout_s=30)
    options = ParallelOptions(plugin="3d", pp=2, microbatch_size=1, batch_size=2)
    with pytest.raises(ValueError) as error:
        boost(tiny_llama(layers=1), options, total_steps=1)
    dist.barrier()  # the other may still be making its groups
    return str(error.value)


def heads_and_experts_that_do_not_divide() -> list[str]:
    """In a worker: three heads, and experts of an odd width, over two processes."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.options import ParallelOptions
    from tests.models_table.families import BY_TYPE, tiny_model

    launch(seed=0, timeout_s=30)
    said = []
    for family, changes in (
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}),
        ("qwen3_moe", {"moe_intermediate_size": 33}),
    ):
        with pytest.raises(ValueError) as error:
            model = tiny_model(BY_TYPE[family], **changes)
            boost(model, ParallelOptions(plugin="3d", tp=2, batch_size=2), total_steps=1)
        said.append(str(error.value))
    dist.barrier()
    return said


if transformers_major() >= 5:

    def test_fewer_layers_than_stages():
        said = run(2, f"{__name__}:fewer_layers_than_stages")
        assert said[0].startswith("--pp 2: this model has 1 layers, fewer than stages")

    def test_what_does_not_divide_is_refused_with_the_size():
        heads, experts = run(2, f"{__name__}:heads_and_experts_that_do_not_divide")[0]
        assert heads.startswith("--tp 2: this model's 3 attention heads cannot be divided by 2")
        assert "gate_up_proj" in experts and "33 columns" in experts

    def test_another_form_of_layer_output_than_expected_is_refused():
        """The base model would take the first row of a tensor for the first of a tuple."""
        from coati.parallel.policy.pipeline import _checked

        layer = nn.Identity()
        layer.register_forward_hook(_checked(tuples=True))
        with pytest.raises(ValueError, match="--pp: Identity returns a Tensor"):
            layer(nn.Parameter().detach())
