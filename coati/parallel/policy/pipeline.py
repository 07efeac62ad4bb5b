"""Pipeline stages: the layers of other stages pass their input on."""

from typing import Any

from torch import Tensor, nn

from coati.parallel.policy.plan import pp_plan


def held_layers(policy) -> list[nn.Module]:
    """The modules of this process's stage."""
    manager = policy.pipeline_stage_manager
    base = policy.base
    start, end = _range(policy)
    before, after = _ends(policy)
    ends = {"layers", *before, *after}
    held = [module for name, module in base.named_children() if name not in ends]
    held += base.layers[start:end]
    if manager.is_first_stage():
        held += [getattr(base, name) for name in before]
    if manager.is_last_stage():
        held += [*(getattr(base, name) for name in after), policy.model.get_output_embeddings()]
    return held


def shared_params(policy) -> list[dict[int, Tensor]]:
    """Tied weights that two stages hold: {stage: parameter} each."""
    manager = policy.pipeline_stage_manager
    if manager is None or manager.num_stages == 1 or not policy.tied:
        return []
    head = policy.model.get_output_embeddings()
    embedding = policy.base.get_input_embeddings()
    return [{0: embedding.weight, manager.num_stages - 1: head.weight}]


def become_a_stage(policy, described: dict) -> None:
    """Describe in ``described`` a forward that runs this process's layers alone."""
    manager = policy.pipeline_stage_manager
    base = policy.base
    start, end = _range(policy)
    for index, layer in enumerate(base.layers):
        if not start <= index < end:
            layer.forward = _pass_on
    before, after = _ends(policy)
    elsewhere = [] if manager.is_last_stage() else after
    elsewhere = elsewhere if manager.is_first_stage() else [*elsewhere, *before[1:]]
    for name in elsewhere:  # called with the hidden states on every stage
        getattr(base, name).forward = _pass_on
    whole = type(policy.model).forward

    def forward(
        model, input_ids=None, hidden_states=None, attention_mask=None, position_ids=None, **_
    ):
        first = manager.is_first_stage()
        tokens = {"input_ids": input_ids} if first else {"inputs_embeds": hidden_states}
        inputs = tokens | {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": False,
        }
        if manager.is_last_stage():
            return whole(model, **inputs)
        return {"hidden_states": base(**inputs)[0]}

    policy.describe(described, policy.model).method_replacement = {"forward": forward}


def _range(policy) -> tuple[int, int]:
    """Start and end of this stage's layers."""
    manager = policy.pipeline_stage_manager
    return manager.get_stage_index(manager.distribute_layers(len(policy.base.layers)))


def _ends(policy) -> tuple[list[str], list[str]]:
    """Names of the base model's modules before its layers and after them."""
    names = [name for name in pp_plan(policy.model.config) if hasattr(policy.base, name)]
    place = names.index("layers")
    return names[:place], names[place + 1 :]


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
