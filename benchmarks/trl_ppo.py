"""Episodes of PPO by TRL 1.12.0, the last with a PPO trainer; a worker of bench_ppo_peers.py.

    python benchmarks/trl_ppo.py FOLDER EPISODES PASSES [--defaults]

FOLDER is what online_case.prepare made. An episode is run for each line on standard input, and
printed as a line of JSON. TRL gets the settings that are fastest here: fp32 without gradient
checkpointing. ``--defaults`` leaves its own
defaults instead: bf16 and gradient checkpointing.
"""

import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

from benchmarks import online_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402


class Paced(TrainerCallback):
    """Prints what each episode took as a line of JSON, and waits for a line before the next."""

    def __init__(self, size: case.Size, episodes: int):
        self.size = size
        self.left = episodes
        self.clock = case.Clock()

    def on_train_begin(self, args, state, control, **keywords):
        self._wait()

    def on_step_end(self, args, state, control, **keywords):
        reward = state.log_history[-1]["objective/scores"]
        print(json.dumps(self.clock.read() | {"reward": reward}), flush=True)
        self.left -= 1
        if self.left:
            self._wait()

    def _wait(self) -> None:
        sft_case.wait_for_turn()
        self.clock.start()


def scorer(folder: Path):
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", dtype="float32", num_labels=1
    )
    model.config.pad_token_id = 0
    return model


def main() -> None:
    folder = Path(sys.argv[1])
    episodes = int(sys.argv[2])
    size = replace(case.SIZES["ppo"], passes=int(sys.argv[3]))
    settings = {} if "--defaults" in sys.argv else {"bf16": False, "gradient_checkpointing": False}
    # It finds the end of an answer by the pad id, which must then be one that no answer holds.
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    tokenizer.pad_token_id = 0
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        total_episodes=episodes * size.answers,
        num_ppo_epochs=size.passes,
        per_device_train_batch_size=size.answers,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        response_length=size.new,
        stop_token="eos",
        temperature=case.TEMPERATURE,
        kl_coef=case.KL,
        learning_rate=case.LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=case.BETAS[0],
        adam_beta2=case.BETAS[1],
        weight_decay=0.0,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in case.read(folder, size)])
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32") for _ in range(2)
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer(folder),
        value_model=scorer(folder),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[Paced(size, episodes)],
    )
    print("ready", flush=True)
    trainer.train()
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}),
        flush=True,
    )


if __name__ == "__main__":
    main()
