"""Steps of GRPO by TRL; a worker of bench_ppo_peers.py.

    python benchmarks/trl_grpo.py FOLDER STEPS PASSES [--defaults]

FOLDER is what online_case.prepare made. A step, sampling included, is taken for each line on
standard input, and printed as a line of JSON. TRL gets the settings that are fastest here: fp32
without gradient checkpointing. ``--defaults`` leaves its own defaults instead: bf16 and gradient
checkpointing.
"""

import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from benchmarks import online_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402


class Paced(TrainerCallback):
    """Waits for a line before each step that samples, and prints what it took as a line of JSON."""

    def __init__(self, passes: int):
        self.passes = passes
        self.clock = case.Clock()
        self.found = {}

    def on_step_begin(self, args, state, control, **keywords):
        if state.global_step % self.passes == 0:
            sft_case.wait_for_turn()
            self.clock.start()

    def on_step_end(self, args, state, control, **keywords):
        self.found = self.clock.read()

    def on_log(self, args, state, control, logs, **keywords):
        if "reward" in logs and state.global_step % self.passes == 0:
            more = {"answer_tokens": logs["completions/mean_length"], "reward": logs["reward"]}
            print(json.dumps(self.found | more), flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2])
    size = replace(case.SIZES["grpo"], passes=int(sys.argv[3]))
    settings = {} if "--defaults" in sys.argv else {"bf16": False, "gradient_checkpointing": False}
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps * size.passes,
        per_device_train_batch_size=size.answers,
        gradient_accumulation_steps=1,
        num_generations=size.generations,
        num_iterations=size.passes,
        max_completion_length=size.new,
        temperature=case.TEMPERATURE,
        beta=0.0,
        epsilon=case.CLIP,
        loss_type="grpo",
        learning_rate=case.LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=case.BETAS[0],
        adam_beta2=case.BETAS[1],
        weight_decay=0.0,
        max_grad_norm=case.MAX_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
        reward_funcs=case.score,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": row["text"]} for row in case.read(folder, size)]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Paced(size.passes)],
    )
    print("ready", flush=True)
    trainer.train()
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}),
        flush=True,
    )


if __name__ == "__main__":
    main()
