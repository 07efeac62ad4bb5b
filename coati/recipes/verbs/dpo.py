"""DPO and its family: pairwise losses of policy and reference log-probs."""

from dataclasses import replace

from coati.cli.preferences import dpo_parser, parse_dpo
from coati.cli.settings import DPOSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb("training", dpo_parser, parse_dpo, "coati.recipes.verbs.dpo:main", processes=True)


def main(settings: DPOSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.models.loss_registry import needs_reference
    from coati.recipes import build, offline
    from coati.recipes.data_checks import check_ends
    from coati.recipes.reference_model import precomputed, reference
    from coati.recipes.run import start
    from coati.trainer import DPOTrainer
    from coati.trainer.precompute_reference import WithReference

    run = start(settings, extras)
    rows = offline.load_data(run, "preference")
    check_ends(run, rows.train)
    model = offline.boosted(run, rows, build.policy(run))
    collate = build.collator(run, DataCollatorForPreferenceDataset)
    ref = settings.reference
    wanted = needs_reference(settings.loss.loss_type) and not ref.disable_reference_model
    loaded = wanted and not ref.precompute_ref
    trainer = DPOTrainer(
        reference=reference(run, model.engine, ref.ref_tp) if loaded else None,
        starts_at_reference=wanted and run.resume.weights is None,
        loss=extras.loss,
        **vars(settings.loss),
        **offline.trainer_keywords(run, rows, model),
    )
    if wanted and ref.precompute_ref:
        rows = replace(
            rows,
            train=precomputed(run, trainer, collate, rows.train),
            evaluation=rows.evaluation and precomputed(run, trainer, collate, rows.evaluation),
        )
        collate = WithReference(collate)
    offline.fit(run, trainer, rows, collate)
