"""TRL's DPOTrainer or RewardTrainer on the same model and pairs, one step per line on standard
input; a worker of bench_preference_peers.py.

    python benchmarks/trl_preferences.py dpo|rm FOLDER STEPS PAIRS [--defaults]

FOLDER is what preference_case.real made. TRL gets the settings that are fastest here: fp32 without
gradient checkpointing, the fused AdamW. Its DPO has padded batches only (``padding_free`` is
refused in 1.16). ``--defaults`` leaves its own defaults instead: bf16 and gradient checkpointing.
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
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # noqa: E402

from benchmarks import preference_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402


class AsItIs:
    """The pairs in the file's order, as the token ids that they are."""

    def _get_train_sampler(self, *args, **keywords):
        return SequentialSampler(self.train_dataset)

    def _prepare_dataset(self, dataset, *args, **keywords):
        return dataset


class DPO(AsItIs, DPOTrainer):
    pass


class Reward(AsItIs, RewardTrainer):
    pass


class Paced(TrainerCallback):
    """Waits for a line before each step, and prints each step's time, loss and tokens as a line of
    JSON after it."""

    def __init__(self, pairs: list[dict], batch: int):
        self.pairs = pairs
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
        mine = self.pairs[(state.global_step - 1) * self.batch : state.global_step * self.batch]
        print(
            json.dumps({"seconds": self.seconds, "loss": logs["loss"], **case.counted(mine)}),
            flush=True,
        )


def main() -> None:
    algorithm = sys.argv[1]
    folder = Path(sys.argv[2])
    steps = int(sys.argv[3])
    batch = int(sys.argv[4])
    pairs = case.read(folder, steps * batch)
    settings = {} if "--defaults" in sys.argv else {"bf16": False, "gradient_checkpointing": False}
    settings |= {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": case.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": case.BETAS[0],
        "adam_beta2": case.BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": case.MAX_NORM,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 1024,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shared = {"processing_class": tokenizer, "callbacks": [Paced(pairs, batch)]}
    if algorithm == "dpo":
        trainer = DPO(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
            args=DPOConfig(beta=case.BETA, **settings),
            train_dataset=Dataset.from_list(pairs),
            **shared,
        )
    else:
        # It finds a row's last token by the pad id, which must then be one that no row holds.
        tokenizer.pad_token_id = 0
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "reward", dtype="float32"
        )
        model.config.pad_token_id = 0
        rows = [
            {f"{side}_ids": pair["prompt_ids"] + pair[f"{side}_ids"] for side in case.SIDES}
            for pair in pairs
        ]
        trainer = Reward(
            model=model,
            args=RewardConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            **shared,
        )
    print("ready", flush=True)
    trainer.train()
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}),
        flush=True,
    )


if __name__ == "__main__":
    main()
