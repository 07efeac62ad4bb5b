"""TRL's SFTTrainer, or transformers' Trainer, on the same model and rows, one step per line on
standard input; a worker of bench_sft_peers.py.

    python benchmarks/trl_worker.py WAY FOLDER STEPS BATCH [--defaults]

FOLDER is what sft_case.prepare made. WAY: ``trl``, ``trl_padding_free`` (the rows of a batch as one
sequence, TRL's documented way around padding) or ``transformers``. They get the settings that are
fastest on a CPU: fp32, no gradient checkpointing, the fused AdamW, rows collated in the process
itself (a worker would take a core from the step). ``--defaults`` leaves TRL its own instead: bf16
and gradient checkpointing.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks import sft_case  # noqa: E402


class InFileOrder:
    def _get_train_sampler(self, *args, **keywords):
        return SequentialSampler(self.train_dataset)


class Paced(TrainerCallback):
    """Waits for a line before each step, and prints each step's time, loss and tokens as a line of
    JSON after it."""

    def __init__(self, rows: list[dict], batch: int):
        self.rows = rows
        self.batch = batch
        self.started = 0.0
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **keywords):
        sft_case.wait_for_turn()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **keywords):
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs, **keywords):
        if "loss" not in logs:
            return
        start = (state.global_step - 1) * self.batch
        rows = [self.rows[index % len(self.rows)] for index in range(start, start + self.batch)]
        step = {
            "seconds": self.seconds,
            "loss": logs["loss"],
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "supervised": sum(label != -100 for row in rows for label in row["labels"][1:]),
        }
        print(json.dumps(step), flush=True)


def settings_of(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """What all of them are given."""
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": sft_case.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": sft_case.BETAS[0],
        "adam_beta2": sft_case.BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": sft_case.MAX_NORM,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def trainer_of(way: str, settings: dict[str, Any], model: Any, tokenizer: Any) -> Any:
    """Makes the trainer of ``way`` from what all take."""
    if way == "transformers":

        class Plain(InFileOrder, Trainer):
            pass

        collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
        args = TrainingArguments(bf16=False, gradient_checkpointing=False, **settings)
        return lambda **others: Plain(model, args, data_collator=collate, **others)
    from trl import SFTConfig, SFTTrainer

    class OfTRL(InFileOrder, SFTTrainer):
        pass

    if "--defaults" not in sys.argv:
        settings |= {"bf16": False, "gradient_checkpointing": False}
    # the rows are no longer than they may be; TRL does not cut without padding
    config = SFTConfig(max_length=None, padding_free=way == "trl_padding_free", **settings)
    return lambda **others: OfTRL(model=model, args=config, **others)


def main() -> None:
    way = sys.argv[1]
    folder = Path(sys.argv[2])
    steps = int(sys.argv[3])
    batch = int(sys.argv[4])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = rows[: len(rows) // batch * batch]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    make = trainer_of(way, settings_of(folder, steps, batch), model, tokenizer)
    trainer = make(
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Paced(rows, batch)],
    )
    print("ready", flush=True)
    trainer.train()
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}),
        flush=True,
    )


if __name__ == "__main__":
    main()
