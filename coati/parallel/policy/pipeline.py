"""Pipeline stages: the model's own forward, in which the layers of other stages pass their input
on."""

from typing import Any

import torch
from torch import Tensor, nn

from coati.parallel.policy.plan import POSITION_EMBEDDINGS, TUPLE_LAYERS, pp_plan


class Stack:
    """The children of a base model that run one after another: ``before`` the layers, ``layers``
    (a ModuleList) and ``after`` them. Raises ValueError without a plan."""

    def __init__(self, base: nn.Module) -> None:
        self.owner = getattr(base, "decoder", base)  # OPT keeps them one module deeper
        names = [name for name in pp_plan(base.config) if hasattr(self.owner, name)]
        place = next(
            (i for i, n in enumerate(names) if isinstance(getattr(self.owner, n), nn.ModuleList)),
            None,
        )
        if place is None:
            raise ValueError(
                f"--pp: transformers has no pipeline plan for {base.config.model_type} models; use "
                "--tp or --plugin zero2"
            )
        self.layers: Any = getattr(self.owner, names[place])
        self.before = [getattr(self.owner, name) for name in names[:place]]
        self.after = [getattr(self.owner, name) for name in names[place + 1 :]]
        self.positions = [
            getattr(self.owner, name) for name in POSITION_EMBEDDINGS if hasattr(self.owner, name)
        ]


def held_layers(policy) -> list[nn.Module]:
    """The modules of this process's stage."""
    manager = policy.pipeline_stage_manager
    stack = Stack(policy.base)
    start, end = _range(policy, stack)
    ends = [stack.layers, *stack.before, *stack.after, *stack.positions]
    # Rotary embeddings and the like, which every stage computes for itself.
    held = [child for child in stack.owner.children() if not any(child is end for end in ends)]
    _check_without_weights(held)
    held += stack.layers[start:end]
    if manager.is_first_stage():
        held += [*stack.before, *stack.positions]
    if manager.is_last_stage():
        held += [*stack.after, policy.inner.get_output_embeddings()]
    return held


def _check_without_weights(everywhere: list[nn.Module]) -> None:
    """Weights on every stage would be trained on one and saved by another."""
    for module in everywhere:
        if any(True for _ in module.parameters()):
            raise ValueError(
                f"--pp: {type(module).__name__} has weights and no place in the pipeline plan; use "
                "--tp or --plugin zero2"
            )


def shared_params(policy) -> list[dict[int, Tensor]]:
    """Tied weights that two stages hold: {stage: parameter} each."""
    manager = policy.pipeline_stage_manager
    if manager is None or manager.num_stages == 1 or not policy.tied:
        return []
    head = policy.inner.get_output_embeddings()
    embedding = policy.base.get_input_embeddings()
    return [{0: embedding.weight, manager.num_stages - 1: head.weight}]


def become_a_stage(policy, described: dict) -> None:
    """Describe in ``described`` a forward that runs this process's layers alone."""
    manager = policy.pipeline_stage_manager
    base = policy.base
    stack = Stack(base)
    start, end = _range(policy, stack)
    tuples = base.config.model_type in TUPLE_LAYERS
    for index, layer in enumerate(stack.layers):
        if start <= index < end:
            layer.register_forward_hook(_checked(tuples))
        else:
            layer.forward = _pass_on_in_tuple if tuples else _pass_on
    # What comes before the layers is called with the states on every stage, but for the embedding
    # of the tokens, which later stages are not asked for.
    elsewhere = [] if manager.is_last_stage() else stack.after
    if not manager.is_first_stage():
        elsewhere = [*elsewhere, *stack.before[1:]]
        for module in stack.positions:
            module.forward = _nothing
    for module in elsewhere:
        module.forward = _pass_on
    whole = type(policy.inner).forward

    def forward(
        model,
        input_ids=None,
        hidden_states=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        **_,
    ):
        first = manager.is_first_stage()
        tokens = {"input_ids": input_ids} if first else {"inputs_embeds": hidden_states}
        inputs = tokens | {"attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if manager.is_last_stage():
            return whole(model, **inputs, **({} if labels is None else {"labels": labels}))
        return {"hidden_states": base(**inputs)[0]}

    policy.describe(described, policy.inner).method_replacement = {"forward": forward}


def _range(policy, stack: Stack) -> tuple[int, int]:
    """Start and end of this stage's layers."""
    manager = policy.pipeline_stage_manager
    if len(stack.layers) < manager.num_stages:
        raise ValueError(
            f"--pp {manager.num_stages}: this model has {len(stack.layers)} layers, fewer than "
            "stages"
        )
    return manager.get_stage_index(manager.distribute_layers(len(stack.layers)))


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _pass_on_in_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return hidden_states, None


def _checked(tuples: bool):
    """A hook that refuses a layer whose output has another form than those that are passed on: the
    base model would take the first row of a tensor for the first of a tuple, without a word."""

    def check(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, tuple) != tuples:
            raise ValueError(
                f"--pp: {type(module).__name__} returns a {type(output).__name__}, which the "
                "pipeline plan does not expect; use --tp or --plugin zero2"
            )

    return check


def _nothing(*_: Any, **__: Any) -> Tensor:
    return torch.zeros(())
