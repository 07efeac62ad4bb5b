"""The table of docs/migrate.md: names of flags in other libraries, from the parsers."""

from coati.cli.aliases import (
    DIFFERENT,
    IN_ROLLOUTS,
    MAPPED,
    MAPPED_IN_TRAINING,
    SAME,
    SAME_OF,
    Mapped,
)

SPECIAL = {
    "use_peft": "LoRA, of rank 16 unless a rank is given",
    "pref_beta": "`--beta`, of orpo `--lam`",
    "finetuning_type": "`lora`: LoRA, of rank 8 unless a rank is given; `full`: all weights",
    "beta": "`--kl_coef` of grpo, `--lam` of orpo, `--gkd_beta` of gkd",
    "block_size": "`--max_length` of pretrain",
    "train_file_dir": "`--dataset` of pretrain",
    "validation_file_dir": "`--eval_dataset` of pretrain",
    "temperature": "of grpo `--initial_temperature` and `--final_temperature` both",
    "resume_from_checkpoint": "`--checkpoint_path`; `true` is `auto`",
    "eval_strategy": "`steps` and `epoch`, as `--eval_interval` says; `no` without rows for it",
    "evaluation_strategy": "as `eval_strategy`",
    "logging_strategy": "`steps`, as `--log_interval` says",
    "save_strategy": "`steps`; `no` is `--save_interval 0`",
    "lr_scheduler_type": "`lr_scheduler`",
}


def alias_tables() -> str:
    """What is taken for what, and what is refused with which words."""
    taken = ["| name elsewhere | here |", "| --- | --- |"]
    rows = {
        name: " or ".join(f"`--{flag}`" for flag in flags.split()) for name, flags in SAME.items()
    }
    mapped = {name: _mapped(MAPPED[name]) for name in MAPPED}
    for name, row in MAPPED_IN_TRAINING.items():
        more = f"in training {_mapped(row)}"
        mapped[name] = f"{mapped[name]}; {more}" if name in mapped else more
    rows |= mapped | SPECIAL
    assert {name for row in SAME_OF.values() for name in row} <= set(SPECIAL)
    taken += [f"| `{name}` | {rows[name]} |" for name in sorted(rows)]
    refused = ["| name elsewhere | what is said |", "| --- | --- |"]
    refused += [f"| `{name}` | {_cell(text)} |" for name, (_, text) in sorted(DIFFERENT.items())]
    refused += [
        f"| `{name}` of ppo and grpo | {_cell(text)} |"
        for name, text in sorted(IN_ROLLOUTS.items())
    ]
    return "\n".join([*taken, "", *refused])


def _mapped(row: Mapped) -> str:
    found = []
    for value, flags in row.values.items():
        words = " ".join(
            f"--{dest}" if set_to is True else f"--{dest} {str(set_to).lower()}"
            for dest, set_to in flags.items()
        )
        if words:
            found.append(f"`{value}`: `{words}`")
    return "; ".join(found)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
