"""LoRA adapters through peft."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "LoraConfig": "lora",
        "apply_lora": "lora",
        "convert_to_lora_module": "lora",
        "merge_lora": "lora",
        "merged": "lora",
        "load_lora": "adapter_files",
        "save_lora": "adapter_files",
    },
)
