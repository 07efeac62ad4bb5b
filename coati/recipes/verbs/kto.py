"""KTO: preferences from single responses, each labeled desirable or not."""

from coati.cli.preferences import kto_parser, parse_kto
from coati.cli.settings import KTOSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb("training", kto_parser, parse_kto, "coati.recipes.verbs.kto:main", processes=True)


def main(settings: KTOSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForKTODataset
    from coati.recipes import build, offline
    from coati.recipes.data_checks import check_ends, kto_weights
    from coati.recipes.reference_model import reference
    from coati.recipes.run import start
    from coati.trainer import KTOTrainer

    run = start(settings, extras)
    rows = offline.load_data(run, "kto")
    check_ends(run, rows.train)
    desirable, undesirable = kto_weights(
        settings, rows.train.rows, only_first=rows.stream is not None
    )
    model = offline.boosted(run, rows, build.policy(run))
    trainer = KTOTrainer(
        reference=reference(run, model.engine, settings.reference.ref_tp),
        beta=settings.loss.beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        **offline.trainer_keywords(run, rows, model),
    )
    collate = build.collator(run, DataCollatorForKTODataset)
    offline.fit(run, trainer, rows, collate, partners=True)
