"""Conversations from files to token ids: templates, loss masks, preparation, loading. Knows no model."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Conversation": "conversation",
        "setup_conversation_template": "conversation",
        "tokenize_sft": "tokenization",
        "tokenize_prompt": "tokenization",
        "tokenize_rlhf": "tokenization",
        "tokenize_kto": "tokenization",
        "prepare_dataset": "prepare",
        "DataCollatorForSupervisedDataset": "collator",
        "DataCollatorForPromptDataset": "collator",
        "DataCollatorForPreferenceDataset": "collator",
        "DataCollatorForKTODataset": "collator",
        "StatefulDistributedSampler": "loader",
        "load_tokenized_dataset": "loader",
    },
)
