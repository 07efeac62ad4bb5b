"""Models, losses, adapters and sampling: torch, transformers and peft, importable without ColossalAI."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "LoraConfig": "lora",
        "apply_lora": "lora",
        "convert_to_lora_module": "lora",
        "merge_lora": "lora",
        "merged": "lora",
        "load_lora": "lora_files",
        "save_lora": "lora_files",
        "generate": "generation",
        "generate_streaming": "generation",
        "check_vocabulary": "utils",
        "disable_dropout": "utils",
        "get_model_numel": "utils",
        "load_causal_lm": "utils",
        "load_tokenizer": "utils",
        "load_backbone": "utils",
        "Head": "head",
        "BaseModel": "base",
        "RewardModel": "reward_model",
        "RLVRRewardModel": "rlvr_reward_model",
        "Critic": "critic",
        "load_scalar_model": "scalar",
        "GPTLMLoss": "loss",
        "LogSigLoss": "loss",
        "LogExpLoss": "loss",
        "DpoLoss": "loss",
        "PolicyLoss": "policy_loss",
        "ValueLoss": "policy_loss",
    },
)
