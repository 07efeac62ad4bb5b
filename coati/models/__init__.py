"""Models, losses, adapters and sampling: torch, transformers and peft, importable without
ColossalAI."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "LoraConfig": "lora.lora",
        "apply_lora": "lora.lora",
        "convert_to_lora_module": "lora.lora",
        "merge_lora": "lora.lora",
        "merged": "lora.lora",
        "load_lora": "lora.adapter_files",
        "save_lora": "lora.adapter_files",
        "generate": "generation.loop",
        "generate_streaming": "generation.loop",
        "check_vocabulary": "tokenizer",
        "disable_dropout": "loading",
        "get_model_numel": "loading",
        "load_causal_lm": "loading",
        "load_tokenizer": "tokenizer",
        "load_backbone": "loading",
        "Head": "head",
        "BaseModel": "base",
        "RewardModel": "reward_model",
        "RLVRRewardModel": "rlvr_reward_model",
        "Critic": "critic",
        "load_scalar_model": "scalar_loading",
        "GPTLMLoss": "loss",
        "LogSigLoss": "loss",
        "LogExpLoss": "loss",
        "DpoLoss": "pairwise_loss",
        "PolicyLoss": "policy_loss",
        "ValueLoss": "policy_loss",
    },
)
