"""Continued pre-training: next-token cross-entropy on every token of documents."""

from coati.trainer.sft import SFTTrainer


class PretrainTrainer(SFTTrainer):
    """An :class:`~coati.trainer.sft.SFTTrainer` whose rows are pieces of documents (type text),
    perhaps with conversations among them. Its evaluations report loss and perplexity."""

    name = "pretrain"
