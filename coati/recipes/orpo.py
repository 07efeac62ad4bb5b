"""ORPO: SFT and preferences in one stage, without a reference model."""

from coati.cli.settings import ORPOSettings
from coati.dataset import DataCollatorForPreferenceDataset
from coati.recipes import build, offline
from coati.recipes.data_checks import check_ends
from coati.recipes.run import start
from coati.trainer import ORPOTrainer


def main(settings: ORPOSettings) -> None:
    run = start(settings)
    rows = offline.load_data(run, "preference")
    check_ends(run, rows.train)
    model = offline.boosted(run, rows, build.policy(run))
    trainer = ORPOTrainer(lam=settings.lam, **offline.trainer_keywords(run, rows, model))
    offline.fit(run, trainer, rows, build.collator(run, DataCollatorForPreferenceDataset))
