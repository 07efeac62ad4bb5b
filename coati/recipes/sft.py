"""Supervised fine-tuning."""

from coati.cli.settings import SLSettings
from coati.dataset import DataCollatorForSupervisedDataset
from coati.recipes import build, offline
from coati.recipes.run import start
from coati.trainer import SFTTrainer


def main(settings: SLSettings) -> None:
    run = start(settings)
    rows = offline.load_data(run, "sft")
    model = offline.boosted(run, rows, build.causal_lm(run))
    trainer = SFTTrainer(**offline.trainer_keywords(run, rows, model))
    offline.fit(run, trainer, rows, build.collator(run, DataCollatorForSupervisedDataset))
