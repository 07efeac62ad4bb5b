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
        "GKDTrainer": "gkd",
        "ILQLTrainer": "ilql",
        "PPOTrainer": "ppo",
        "GRPOTrainer": "grpo",
        "OLTrainer": "online",
        "OnlineDPOTrainer": "online_dpo",
        "SLTrainer": "base",
        "RunSchedule": "schedule",
    },
)
