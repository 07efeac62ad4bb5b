"""ORPO: SFT and preferences in one stage, without a reference model."""

from coati.cli.preferences import orpo_parser, parse_orpo
from coati.cli.settings import ORPOSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb("training", orpo_parser, parse_orpo, "coati.recipes.verbs.orpo:main", processes=True)


def main(settings: ORPOSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.recipes import build, offline
    from coati.recipes.data_checks import check_ends
    from coati.recipes.run import start
    from coati.trainer import ORPOTrainer

    run = start(settings, extras)
    rows = offline.load_data(run, "preference")
    check_ends(run, rows.train)
    model = offline.boosted(run, rows, build.policy(run))
    trainer = ORPOTrainer(lam=settings.lam, **offline.trainer_keywords(run, rows, model))
    offline.fit(run, trainer, rows, build.collator(run, DataCollatorForPreferenceDataset))
