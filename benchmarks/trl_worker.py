"""TRL's SFTTrainer on the same model and rows, one step per line on standard input; runs in TRL's
own environment.

    python benchmarks/trl_worker.py FOLDER STEPS [--defaults]

FOLDER is what sft_case.prepare made. TRL gets the settings that are fastest here: fp32 without
gradient checkpointing. ``--defaults`` leaves its own defaults instead: bf16 and gradient
checkpointing.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from benchmarks import sft_case  # noqa: E402


class InFileOrder(SFTTrainer):
    def _get_train_sampler(self, *args, **keywords):
        return SequentialSampler(self.train_dataset)


class Paced(TrainerCallback):
    """Waits for a line before each step, and prints each step's time, loss and tokens as a line of
    JSON after it."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.started = 0.0
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **keywords):
        sys.stdin.readline()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **keywords):
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs, **keywords):
        if "loss" not in logs:
            return
        start = (state.global_step - 1) * sft_case.BATCH_SIZE
        rows = [
            self.rows[index % len(self.rows)] for index in range(start, start + sft_case.BATCH_SIZE)
        ]
        step = {
            "seconds": self.seconds,
            "loss": logs["loss"],
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "supervised": sum(label != -100 for row in rows for label in row["labels"][1:]),
        }
        print(json.dumps(step), flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = rows[: len(rows) // sft_case.BATCH_SIZE * sft_case.BATCH_SIZE]
    settings = {} if "--defaults" in sys.argv else {"bf16": False, "gradient_checkpointing": False}
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=sft_case.BATCH_SIZE,
        gradient_accumulation_steps=1,
        learning_rate=sft_case.LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=sft_case.BETAS[0],
        adam_beta2=sft_case.BETAS[1],
        weight_decay=0.0,
        max_grad_norm=sft_case.MAX_NORM,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_length=512,
        **settings,
    )
    trainer = InFileOrder(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Paced(rows)],
    )
    print("ready", flush=True)
    trainer.train()
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}),
        flush=True,
    )


if __name__ == "__main__":
    main()
