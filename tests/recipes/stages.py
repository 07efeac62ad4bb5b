"""What the workers of test_quick_start.py do: stages of the Python front door, one after the other
in a process."""

import contextlib
import gc
import io
import os
from pathlib import Path
from typing import Any

import coati
from tests.end_to_end.inputs import weights

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SFT = {"lr": 1e-3, "batch_size": 2, "accumulation_steps": 2, "max_length": 160, "max_steps": 4}
DPO = {"lr": 1e-3, "batch_size": 2, "accumulation_steps": 2, "max_steps": 2, "beta": 0.2}
GRPO = {
    "num_episodes": 2,
    "num_collect_steps": 1,
    "experience_batch_size": 2,
    "num_generations": 4,
    "num_update_steps": 1,
    "train_batch_size": 4,
    "accumulation_steps": 2,
    "max_length": 100,
    "max_seq_len": 8,
    "sample_interval": 0,
    "lr": 1e-3,
}
PPO = {name: value for name, value in GRPO.items() if name != "num_generations"} | {
    "train_batch_size": 1
}
PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f"It is the number {n}.", "rejected": "Who knows?"}
    for n in range(12)
]
PROMPTS = [{"prompt": f"What is {n} + 1?", "gt_answer": str(n + 1)} for n in range(8)]


def as_in_a_notebook(folder: str) -> None:
    """No launcher, and a working directory for what is written by default."""
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.chdir(folder)


class Record(coati.Callback):
    """Writes down every call. ``stop_at``: the step at which it asks to stop, on ``rank``."""

    def __init__(self, stop_at: int | None = None, rank: int | None = None) -> None:
        self.calls: list[tuple[str, int, Any]] = []
        self.stop_at = stop_at
        self.rank = rank

    def _add(self, event: str, trainer: Any, about: Any = None) -> None:
        self.calls.append((event, getattr(trainer, "episode", trainer.state.step), about))

    def on_train_begin(self, trainer):
        self._add("begin", trainer)

    def on_step(self, trainer, metrics):
        self._add("step", trainer, metrics)
        mine = self.rank is None or os.environ.get("RANK") == str(self.rank)
        if trainer.state.step == self.stop_at and mine:
            raise coati.StopTraining("that is enough")

    def on_log(self, trainer, metrics):
        self._add("log", trainer, metrics)

    def on_evaluate(self, trainer, metrics):
        self._add("evaluate", trainer, metrics)

    def on_save(self, trainer, path):
        self._add("save", trainer, path.name)

    def on_train_end(self, trainer):
        self._add("end", trainer, trainer.stopped_early)


def models_in_memory() -> list[str]:
    gc.collect()
    kinds = ("LlamaForCausalLM", "LlamaModel")
    return [kind for one in gc.get_objects() if (kind := type(one).__name__) in kinds]


def two_stages(folder: str, model: str, rows: list) -> dict[str, Any]:
    """SFT and DPO in one process, as two cells of a notebook."""
    as_in_a_notebook(folder)
    found: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()) as piped:
        first = coati.sft(model, rows, eval_dataset=rows[:4], lora_rank=4, **SFT)
        found["left by sft"] = models_in_memory()
        found["answers"] = first.generate(["Hello", [{"role": "user", "content": "Who?"}]], 6)
    found["piped"] = piped.getvalue()
    found["one answer"] = first.generate("Hello", max_new_tokens=6)
    found["sampled"] = [first.generate("Hello", 6, temperature=1.5, seed=s) for s in (1, 1, 2)]
    found["held by generate"] = models_in_memory()
    second = coati.dpo(first, PAIRS, **DPO)
    found["left by dpo"] = models_in_memory()
    found["places"] = [str(first.run_dir), first.path, str(second.run_dir), second.path]
    found["history"] = first.history
    found["evaluations"] = [first.evaluation, second.evaluation]
    found["stopped"] = [first.stopped_early, second.stopped_early]
    found["saved"] = str(second.save("final"))
    found["said"] = second.generate("Hello", 6)
    found["said again"] = _generated_by_transformers("final")
    try:
        second.save("final")
    except ValueError as error:
        found["refused"] = str(error)
    return found


def _generated_by_transformers(folder: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids.pop("token_type_ids", None)  # of transformers 4, whose generate refuses them
    new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def interrupted(folder: str, model: str, rows: list) -> dict[str, Any]:
    """A run that its callback ends, the same run gone on with, and one that nobody disturbs."""
    as_in_a_notebook(folder)
    whole = Record()
    other = coati.sft(model, rows, eval_dataset=rows[:4], callbacks=[whole], **SFT)
    cut = Record(stop_at=2)
    stopped = coati.sft(model, rows, eval_dataset=rows[:4], callbacks=[cut], save_dir="cut", **SFT)
    found = {"path": stopped.path, "stopped": stopped.stopped_early}
    found["answer"] = stopped.generate("Hello", 4)
    again = coati.sft(
        model, rows, eval_dataset=rows[:4], save_dir="cut", checkpoint_path="auto", **SFT
    )
    found |= {"whole": whole.calls, "cut": cut.calls, "again": again.stopped_early}
    found["same"] = weights(Path("cut")) == weights(other.run_dir)
    found["history"] = [row["train/loss"] for row in other.history if "train/loss" in row]
    return found


def own_losses(folder: str, model: str, rows: list) -> dict[str, bool]:
    """Whether the built-in losses, written by hand, train the same weights."""
    import torch
    import torch.nn.functional as F

    as_in_a_notebook(folder)
    same = {}
    for accumulation in (1, 4):
        kind = {"accumulation_steps": accumulation}
        sft = SFT | kind
        runs = [coati.sft(model, rows, loss=loss, **sft) for loss in (None, lambda p, _: -p)]
        runs.append(coati.sft(model, rows, loss=lambda p, _: -2 * p, **sft, grad_clip=1.0))
        stored = [weights(run.run_dir) for run in runs]
        same[f"sft {accumulation}"] = stored[0] == stored[1] != stored[2]
        dpo = DPO | kind | {"batch_size": 2, "max_epochs": 2}
        own = [None, lambda pair: -F.logsigmoid(0.2 * pair.d), lambda pair: (pair.d - 1).square()]
        stored = [weights(coati.dpo(model, PAIRS, loss=loss, **dpo).run_dir) for loss in own]
        same[f"dpo {accumulation}"] = stored[0] == stored[1] != stored[2]

    def clipped(tokens):
        ratio = tokens.log_ratio.exp()
        return -torch.minimum(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)

    runs = [
        coati.grpo(model, PROMPTS, reward=vowels, loss=loss, **GRPO)
        for loss in (None, clipped, lambda tokens: -tokens.logps * tokens.advantages)
    ]
    stored = [_actor(run) for run in runs]
    same["grpo"] = stored[0] == stored[1] != stored[2]
    return same


def _actor(run: Any) -> bytes:
    return (Path(run.path) / "model.safetensors").read_bytes()


def vowels(responses):
    """Scores that differ from response to response."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]


def rewarded(folder: str, model: str) -> dict[str, Any]:
    """A reward model, then GRPO and PPO with it and with functions, from a model in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    as_in_a_notebook(folder)
    asked: list[tuple] = []

    def near(responses, gt_answers):
        asked.append((len(responses), gt_answers[0]))
        return [float(len(text)) for text in responses]

    judge = coati.rm(model, PAIRS, **SFT | {"max_steps": 2})
    found: dict[str, Any] = {"pair": judge.score(PAIRS[0]), "pairs": judge.score(PAIRS[:2])}
    messages = [
        {"role": "user", "content": "What is 0?"},
        {"role": "assistant", "content": "It is the number 0."},
    ]
    found["messages"] = judge.score(messages)
    record = Record()
    start = {
        "pretrain": AutoModelForCausalLM.from_pretrained(model),
        "tokenizer": AutoTokenizer.from_pretrained(model),
    }
    trained = coati.grpo(
        **start,
        prompt_dataset=PROMPTS,
        reward=[vowels, near, lambda responses: [0.0] * len(responses), judge],
        reward_weights=[1.0, 0.5, 1.0],
        callbacks=[record],
        **GRPO,
    )
    found |= {"asked": asked, "calls": record.calls, "history": trained.history}
    found["grpo"] = trained.path
    found["ppo"] = coati.ppo(trained, PROMPTS, reward=judge, **PPO).path
    return found


def ended(folder: str, model: str) -> dict[str, list]:
    """Share of ended responses and their tokens in each episode of GRPO and PPO."""
    as_in_a_notebook(folder)
    runs = {
        "grpo": coati.grpo(model, PROMPTS, reward=vowels, **GRPO),
        "ppo": coati.ppo(model, PROMPTS, reward=vowels, **PPO),
    }
    names = ("train/stop_rate", "train/response_length")
    return {
        verb: [[row[name] for name in names] for row in run.history if names[0] in row]
        for verb, run in runs.items()
    }


def on_two_ranks(folder: str, model: str, rows: list) -> dict[str, Any]:
    """A callback of rank 1 ends the run of both; and ranks that hold different rows."""
    os.chdir(folder)
    record = Record(stop_at=3, rank=1)
    run = coati.sft(model, rows, callbacks=[record], **SFT | {"accumulation_steps": 1})
    found = {"place": str(run.run_dir), "path": run.path, "answer": run.generate("Hello", 4)}
    found["steps"] = [metrics for event, _, metrics in record.calls if event == "step"]
    found["end"] = record.calls[-1]
    try:
        coati.sft(model, rows[int(os.environ["RANK"]) :], **SFT)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def placed(folder: str, model: str, rows: list) -> dict[str, Any]:
    """Where runs are written: as a file of flags says, under the flag's older name, and, of a run
    that fails before its first step, nowhere."""
    as_in_a_notebook(folder)
    Path("flags.yaml").write_text("save_dir: told\nmax_steps: 1\n")
    once = SFT | {"max_steps": 1}
    runs = [coati.sft(model, rows, config="flags.yaml", **SFT | {"max_steps": None})]
    runs += [coati.sft(model, rows, save_path="older", **once), coati.sft(model, rows, **once)]
    try:
        coati.sft(model, rows[:2], **once)
    except ValueError as error:
        refused = str(error)
    steps = [len([row for row in run.history if "train/loss" in row]) for run in runs]
    places = [run.path for run in runs]
    return {"places": places, "steps": steps, "refused": refused, "left": os.listdir("output/sft")}


def rehearsed(folder: str, model: str, rows: list) -> str:
    """A dry run, which leaves nothing to use."""
    as_in_a_notebook(folder)
    run = coati.sft(model, rows, dry_run=True, **SFT)
    try:
        return run.path
    except ValueError as error:
        return str(error)
