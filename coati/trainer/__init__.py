"""Trainers: a loss and what it needs; the loop is shared."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SFTTrainer": "sft",
        "PretrainTrainer": "pretrain",
        "RewardModelTrainer": "rm",
        "DPOTrainer": "dpo",
        "ORPOTrainer": "orpo",
        "KTOTrainer": "kto",
        "PPOTrainer": "ppo",
        "GRPOTrainer": "grpo",
        "OLTrainer": "online",
        "SLTrainer": "base",
        "RunSchedule": "schedule",
    },
)
