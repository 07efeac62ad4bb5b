"""User code that leaves: callbacks, losses, rewards and worker processes that exit, with whatever
code and on whatever rank, never end a run as a success."""

import os
import subprocess
import sys

import pytest

import coati
from coati.dataset.prepare import workers
from coati.dataset.prepare.shard_plan import Task
from coati.parallel.launch import shut_down
from coati.utils.errors import RunFailed
from tests.end_to_end.inputs import ROOT

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}]}
    for i in range(8)
]
SETTINGS = {
    "batch_size": 2,
    "accumulation_steps": 1,
    "max_steps": 2,
    "max_length": 96,
    "plugin": "ddp",
    "mixed_precision": "fp32",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    shut_down()


class Leaves(coati.Callback):
    """Leaves at an event."""

    def __init__(self, event: str, error: BaseException) -> None:
        def leave(*_):
            raise error

        setattr(self, event, leave)


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("on_train_begin", SystemExit(0)),
        ("on_step", SystemExit(None)),
        ("on_log", GeneratorExit()),
        ("on_train_end", SystemExit(0)),
    ],
)
def test_a_callback_that_leaves(model, tmp_path, event, error):
    with pytest.raises(RunFailed, match=rf"Leaves\.{event} was ended early by .*{__name__[-16:]}"):
        coati.sft(
            model,
            ROWS,
            callbacks=[Leaves(event, error)],
            save_dir=str(tmp_path / "out"),
            **SETTINGS,
        )
    assert not (tmp_path / "out" / "modeling").exists()


def test_a_loss_that_leaves(model, tmp_path):
    def loss(*_):
        sys.exit(0)

    with pytest.raises(RunFailed, match=r"sys\.exit\(0\) at .*test_early_exits\.py"):
        coati.sft(model, ROWS, loss=loss, save_dir=str(tmp_path / "out"), **SETTINGS)
    assert not (tmp_path / "out" / "modeling").exists()


class LeavingWorker:
    """A worker of a preparation that leaves at the second chunk."""

    def __init__(self, leave) -> None:
        self.leave = leave

    def run(self, chunk, evaluation):
        if chunk == "second":
            self.leave(0)
        return chunk


@pytest.mark.parametrize(
    ("leave", "kind", "said"),
    [
        (sys.exit, RunFailed, r"a worker process was ended early by sys\.exit\(0\)"),
        (os._exit, OSError, "a worker process died"),
    ],
)
def test_a_worker_process_that_leaves_in_the_middle(monkeypatch, leave, kind, said):
    monkeypatch.setattr(workers, "is_evaluation", lambda shard: False)
    tasks = [Task(None, "shard", chunk) for chunk in ("first", "second", "third")]
    with pytest.raises(kind, match=said):
        for _ in workers._run_in_pool(LeavingWorker(leave), iter(tasks), 2, None):
            pass


REWARD = """import os, sys
def f(responses):
    if os.environ["RANK"] == "1":
        {leave}
    return [1.0] * len(responses)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leave", "launcher", "said"),
    [
        ("os._exit(0)", "coati", "rank 1 ended with exit code 0 before the end of its run"),
        ("sys.exit(0)", "coati", "reward f raised SystemExit: 0"),
        ("sys.exit(0)", "torchrun", "reward f raised SystemExit: 0"),
    ],
)
def test_a_reward_that_leaves_on_one_rank(online_places, tmp_path, leave, launcher, said):
    file = tmp_path / "reward.py"
    file.write_text(REWARD.format(leave=leave))
    words = ["--pretrain", online_places["model"], "--prompt_dataset", online_places["prompts"]]
    words += ["--conversation_template_config", online_places["template"], "--max_length", "96"]
    words += ["--max_seq_len", "8", "--num_generations", "2", "--num_episodes", "1"]
    words += ["--num_collect_steps", "1", "--experience_batch_size", "2", "--train_batch_size", "4"]
    words += ["--accumulation_steps", "1", "--plugin", "zero2", "--mixed_precision", "fp32"]
    words += ["--reward_functions", f"{file}:f", "--save_dir", str(tmp_path / "out")]
    starts = {
        "coati": ["-m", "coati", "grpo", "--nproc", "2"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
        + ["--master_port", "29731", str(ROOT / "examples/training_scripts/train_grpo.py")],
    }
    run = subprocess.run(
        [sys.executable, *starts[launcher], *words],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode not in (0, None)
    assert said in run.stderr, run.stderr[-3000:]
    assert not (tmp_path / "out" / "actor" / "modeling").exists()
