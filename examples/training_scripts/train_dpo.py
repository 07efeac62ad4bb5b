"""Preferences without a reward model: DPO and its family. ``train_dpo.py --help`` lists the flags,
docs/preferences.md explains them."""

from argparse import Namespace

from coati.cli.preferences import parse_dpo


def main(args: Namespace) -> None:
    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.models.loss_registry import needs_reference
    from coati.recipes import build, data, finish
    from coati.recipes import eval_samples as samples
    from coati.recipes import preference_data_checks as preference_data
    from coati.recipes import reference_model as references
    from coati.recipes import resume as restart
    from coati.trainer import DPOTrainer
    from coati.trainer.precompute_reference import WithReference

    options = build.start(args)
    resume = restart.find_resume(args)
    restart.record_arguments(args)
    tokenizer, template = build.tokenizer_and_template(args)
    train = data.rows_of(args.dataset, args, tokenizer, template, type="preference")
    evaluation = data.evaluation_rows(args, tokenizer, template, "preference")
    state = restart.running_state(args, resume, train)
    plan = data.epoch_plan(args, train)
    data.check_rows(args, options, plan)
    preference_data.check_ends(train, tokenizer, template)
    model = build.policy(args, options, tokenizer, resume)
    assets = build.assets(model, tokenizer, template)
    engine = build.engine(args, options, model, plan, resume)
    collate = DataCollatorForPreferenceDataset(
        tokenizer,
        args.max_length,
        apply_loss_mask=not args.disable_loss_mask,
        pad_to_multiple_of=options.sequence_multiple,
    )
    wanted = needs_reference(args.loss_type) and not args.disable_reference_model
    trainer = DPOTrainer(
        engine=engine,
        reference=references.reference(args, options, engine)
        if wanted and not args.precompute_ref
        else None,
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        beta=args.beta,
        gamma=args.gamma,
        label_smoothing=args.label_smoothing,
        length_normalization=args.length_normalization,
        sft_coef=args.sft_coef,
        ld_alpha=args.ld_alpha,
        starts_at_reference=wanted and resume.weights is None,
        max_epochs=args.max_epochs,
        accumulation_steps=args.accumulation_steps,
        schedule=build.plan(args),
        state=state,
        assets=assets,
        samples=samples.table_of(evaluation, tokenizer, template, options),
    )
    if wanted and args.precompute_ref:
        train = references.precomputed(args, options, trainer, resume, collate, train, "train")
        evaluation = references.precomputed(
            args, options, trainer, resume, collate, evaluation, "valid"
        )
        collate = WithReference(collate)
    windows, evaluation_batches = build.loaders(args, engine, train, evaluation, collate, plan)
    if args.dry_run:
        return finish.dry_run(args, trainer, windows)
    trainer.fit(windows, evaluation_batches, args.log_dir, args.use_wandb)
    finish.save_final(args, trainer)


if __name__ == "__main__":
    arguments = parse_dpo()
    from coati.recipes.finish import guarded

    guarded("train_dpo.py", main, arguments)
