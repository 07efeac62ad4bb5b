"""Preferences from single answers, each judged good or bad. ``train_kto.py --help`` lists the
flags, docs/preferences.md explains them."""

from argparse import Namespace

from coati.cli.preferences import parse_kto


def main(args: Namespace) -> None:
    from coati.dataset import DataCollatorForKTODataset
    from coati.recipes import build, data, finish
    from coati.recipes import eval_samples as samples
    from coati.recipes import preference_data_checks as preference_data
    from coati.recipes import reference_model as references
    from coati.recipes import resume as restart
    from coati.trainer import KTOTrainer

    options = build.start(args)
    resume = restart.find_resume(args)
    restart.record_arguments(args)
    tokenizer, template = build.tokenizer_and_template(args)
    train = data.rows_of(args.dataset, args, tokenizer, template, type="kto")
    evaluation = data.evaluation_rows(args, tokenizer, template, "kto")
    state = restart.running_state(args, resume, train)
    plan = data.epoch_plan(args, train)
    data.check_rows(args, options, plan)
    preference_data.check_ends(train, tokenizer, template)
    weights = preference_data.kto_weights(args, train)
    model = build.policy(args, options, tokenizer, resume)
    assets = build.assets(model, tokenizer, template)
    engine = build.engine(args, options, model, plan, resume)
    collate = DataCollatorForKTODataset(
        tokenizer,
        args.max_length,
        apply_loss_mask=not args.disable_loss_mask,
        pad_to_multiple_of=options.sequence_multiple,
    )
    windows, evaluation_batches = build.loaders(
        args, engine, train, evaluation, collate, plan, partners=True
    )
    trainer = KTOTrainer(
        engine=engine,
        reference=references.reference(args, options, engine),
        beta=args.beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        max_epochs=args.max_epochs,
        accumulation_steps=args.accumulation_steps,
        schedule=build.plan(args),
        state=state,
        assets=assets,
        samples=samples.table_of(evaluation, tokenizer, template, options),
    )
    if args.dry_run:
        return finish.dry_run(args, trainer, windows)
    trainer.fit(windows, evaluation_batches, args.log_dir, args.use_wandb)
    finish.save_final(args, trainer)


if __name__ == "__main__":
    arguments = parse_kto()
    from coati.recipes.finish import guarded

    guarded("train_kto.py", main, arguments)
