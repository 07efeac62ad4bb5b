"""Conversations from files to token ids: templates, loss masks, preparation, loading. Knows no
model."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Conversation": "chat.conversation",
        "setup_conversation_template": "chat.conversation",
        "tokenize_sft": "rows.tokenization",
        "tokenize_prompt": "rows.tokenization",
        "tokenize_rlhf": "rows.tokenization",
        "tokenize_kto": "rows.tokenization",
        "prepare_dataset": "prepare.preparation",
        "DataCollatorForSupervisedDataset": "load.collator",
        "DataCollatorForPromptDataset": "load.collator",
        "DataCollatorForPreferenceDataset": "load.collator",
        "DataCollatorForKTODataset": "load.collator",
        "DataCollatorForScoredDataset": "load.collator",
        "StatefulDistributedSampler": "load.loader",
        "load_tokenized_dataset": "load.loader",
    },
)
