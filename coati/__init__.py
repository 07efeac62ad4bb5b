"""coati: aligning chat models with human feedback on ColossalAI. Importing it loads nothing
heavy."""

import sys
from importlib.abc import MetaPathFinder

from coati.utils.lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {
    "Conversation": "dataset.chat.conversation",
    "Critic": "models.critic",
    "DPOTrainer": "trainer.dpo",
    "Engine": "parallel.engine",
    "GRPOTrainer": "trainer.grpo",
    "KTOTrainer": "trainer.kto",
    "LoraConfig": "models.lora.lora",
    "ORPOTrainer": "trainer.orpo",
    "Objective": "parallel.objective",
    "PPOTrainer": "trainer.ppo",
    "ParallelOptions": "parallel.options",
    "RewardModel": "models.reward_model",
    "RewardModelTrainer": "trainer.rm",
    "SFTTrainer": "trainer.sft",
    "apply_lora": "models.lora.lora",
    "boost": "parallel.boost",
    "generate": "models.generation.loop",
    "load_causal_lm": "models.loading",
    "load_tokenizer": "models.tokenizer",
    "prepare_dataset": "dataset.prepare.preparation",
    "setup_conversation_template": "dataset.chat.conversation",
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
