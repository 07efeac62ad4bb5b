"""The policy that ColossalAI's sharder is given for every model of transformers 5."""

from colossalai.shardformer.policies.base_policy import ModulePolicyDescription, Policy
from torch import Tensor, nn

from coati.parallel.policy import pipeline, sequence, tensor
from coati.utils.transformers_compat import body_name


class TransformersPolicy(Policy):
    """For any causal language model with a plan, and for models with a scalar head whose
    ``backbone`` is one.

    Attributes (set by the sharder): ``model``, ``shard_config``, ``pipeline_stage_manager``.
    """

    def config_sanity_check(self) -> None:
        """Nothing: families.py has checked the model before it came here."""

    def preprocess(self) -> nn.Module:
        # The language model (or model with a scalar head) inside LoRA's wrapper, and its body.
        adapted = hasattr(self.model, "peft_config")
        self.inner = self.model.get_base_model() if adapted else self.model
        self.base = base_of(self.inner)
        has_head = hasattr(self.inner, "get_output_embeddings")
        self.tied = has_head and self.tie_weight_check()
        return self.model

    def postprocess(self) -> nn.Module:
        return self.model

    def module_policy(self) -> dict:
        policy: dict = {}
        if self.shard_config.enable_tensor_parallelism:
            tensor.split(self, policy)
        if self.pipeline_stage_manager is not None:
            pipeline.become_a_stage(self, policy)
        if self.shard_config.enable_sequence_parallelism:
            sequence.split(self)
        return policy

    def get_held_layers(self) -> list[nn.Module]:
        """The modules of this process's pipeline stage."""
        return pipeline.held_layers(self)

    def get_shared_params(self) -> list[dict[int, Tensor]]:
        """Tied weights that two stages hold: {stage: parameter} each."""
        return pipeline.shared_params(self)

    def describe(self, policy: dict, module: nn.Module) -> ModulePolicyDescription:
        """The description of ``module``'s class in ``policy``, made where it is missing."""
        described = policy.setdefault(type(module), ModulePolicyDescription())
        if described.sub_module_replacement is None:
            described.sub_module_replacement = []
        return described


def base_of(model: nn.Module) -> nn.Module:
    """The model without its vocabulary or scalar head."""
    backbone = getattr(model, "backbone", None)
    return backbone if backbone is not None else getattr(model, body_name(model))
