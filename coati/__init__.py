"""coati: aligning chat models with human feedback on ColossalAI. Importing it loads nothing
heavy."""

import sys
from importlib.abc import MetaPathFinder

from coati.utils.lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {
    "Callback": "trainer.callbacks",
    "Conversation": "dataset.chat.conversation",
    "Critic": "models.critic",
    "DPOTrainer": "trainer.dpo",
    "Engine": "parallel.engine",
    "GKDTrainer": "trainer.gkd",
    "GRPOTrainer": "trainer.grpo",
    "ILQLTrainer": "trainer.ilql",
    "KTOTrainer": "trainer.kto",
    "LoraConfig": "models.lora.lora",
    "ORPOTrainer": "trainer.orpo",
    "Objective": "parallel.objective",
    "OnlineDPOTrainer": "trainer.online_dpo",
    "PPOTrainer": "trainer.ppo",
    "ParallelOptions": "parallel.options",
    "PretrainTrainer": "trainer.pretrain",
    "RewardModel": "models.reward_model",
    "RewardModelTrainer": "trainer.rm",
    "SFTTrainer": "trainer.sft",
    "StopTraining": "trainer.callbacks",
    "TrainedModel": "recipes.trained_model",
    "TrainedRewardModel": "recipes.trained_model",
    "apply_lora": "models.lora.lora",
    "boost": "parallel.boost",
    "dpo": "recipes.quick_start",
    "generate": "models.generation.loop",
    "gkd": "recipes.quick_start",
    "grpo": "recipes.quick_start",
    "ilql": "recipes.quick_start",
    "kto": "recipes.quick_start",
    "load_causal_lm": "models.loading",
    "load_tokenizer": "models.tokenizer",
    "online_dpo": "recipes.quick_start",
    "orpo": "recipes.quick_start",
    "ppo": "recipes.quick_start",
    "prepare_dataset": "dataset.prepare.preparation",
    "pretrain": "recipes.quick_start",
    "rm": "recipes.quick_start",
    "setup_conversation_template": "dataset.chat.conversation",
    "sft": "recipes.quick_start",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)


class _RenamedModules(MetaPathFinder):
    """The first to be asked for a module: those of earlier releases are found under today's name,
    also where a renamed package has a file of that name, which would be loaded a second time."""

    def find_spec(self, name: str, path=None, target=None):
        if not name.startswith("coati.") or name.startswith("coati.legacy"):
            return None
        from coati.legacy.renamed import spec_of_renamed

        return spec_of_renamed(name)


sys.meta_path.insert(0, _RenamedModules())
