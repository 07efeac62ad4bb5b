"""The benchmark of a GPU: every item runs on a CPU in small, what stops or falls over is named, and
the arithmetic is counted right."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_gpu, gpu_models, gpu_parity
from benchmarks.bench_gpu import BY_NAME, Item
from benchmarks.gpu_item import Report, measure
from coati.parallel.objective import Step
from tests.distributed.spawn import run

SERVERS = [name for name, item in BY_NAME.items() if "gpu_servers" in item.work]
TRAINING = [name for name in BY_NAME if name not in SERVERS]


def run_items(names: list[str], folder: str) -> dict[str, dict]:
    """In a worker: one item after the other in one process."""
    paths = {name: Path(folder) / f"{name}.json" for name in names}
    return {name: bench_gpu.run_item(BY_NAME[name], paths[name], True, 300) for name in names}


@pytest.mark.matrix
def test_every_item_of_training_runs_in_small(tmp_path):
    (found,) = run(1, "tests.benchmarks.test_bench_gpu:run_items", TRAINING, str(tmp_path))
    stored = json.loads((tmp_path / "dpo_lora_qwen25_7b.json").read_text())
    assert stored == found["dpo_lora_qwen25_7b"]
    on_cpu = {"kernels": "skipped"} if not torch.cuda.is_available() else {}
    assert {name: row["status"] for name, row in found.items()} == {
        name: on_cpu.get(name, "done") for name in TRAINING
    }
    for plugin in ("ddp", "zero2", "zero2_cpu", "gemini"):
        row = found[f"parity_{plugin}"]
        assert row["ok"] and set(gpu_parity.PRECISIONS) < row.keys()
    tokens = {"lora_sft_llama3_8b": 2 * 64, "dpo_lora_qwen25_7b": 2 * 64, "rl_step_qwen3_4b": 64}
    tokens |= {"dpo_7b_zero2_cpu_batch4": 8 * 64, "sft_qwen3_0.6b": 64}
    for name, count in tokens.items():
        row = found[name]
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(count)
    # a policy that is its own reference
    assert found["dpo_lora_qwen25_7b"]["losses"][0] == pytest.approx(math.log(2), rel=1e-3)
    assert found["dpo_7b_zero2_cpu_batch2"]["losses"][0] == pytest.approx(math.log(2), rel=1e-3)
    assert found["rollouts_qwen3_0.6b"]["sampled"]["turns"] == 4
    assert found["ppo_opt_1.3b"]["episodes"] == 4


@pytest.mark.slow
def test_every_way_of_publishing_runs_on_a_cpu(tmp_path):
    found = run_items(SERVERS, str(tmp_path))
    for sync in ("disk", "http", "nccl", "ipc"):
        row = found[f"publish_{sync}"]
        assert row["engine"] == "own" and row["seconds"] > 0 and row["megabytes"] > 0.3
    assert found["server_own"]["tokens_per_second"] > 0
    assert found["server_vllm"]["reason"].startswith("no environment with vLLM for a GPU")
    assert found["sleep"]["reason"] == "vLLM does not sleep on a CPU"


def test_one_item_in_a_process_of_its_own(tmp_path, monkeypatch):
    output = tmp_path / "found.json"
    words = ["bench_gpu.py", "--tiny", "--only", "kernels", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    bench_gpu.main()
    found = json.loads(output.read_text())
    assert found["tiny"] and found["machine"]["packages"]["torch"] in torch.__version__
    assert list(found["items"]) == ["kernels"]
    assert found["items"]["kernels"]["status"] == (
        "done" if torch.cuda.is_available() else "skipped"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_item_is_named_with_the_reason(tmp_path, monkeypatch, capsys):
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--output", str(output)])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU; --tiny"):
        bench_gpu.main()
    found = json.loads(output.read_text())["items"]
    assert list(found) == list(BY_NAME)
    assert all(row["reason"] == "no NVIDIA GPU" for row in found.values())
    assert capsys.readouterr().out.count("not reached: no NVIDIA GPU") == len(BY_NAME)


ITEM = Item("some", "", {}, {"tokens_per_second": (200.0, "one H100")})
LEFT = "import json, sys; json.dump({'tokens_per_second': 100.0}, open(sys.argv[1], 'w'));"


def in_a_process(monkeypatch, tmp_path, code: str, cap_s: float = 20.0) -> dict:
    monkeypatch.setattr(
        bench_gpu,
        "worker_command",
        lambda name, path, tiny, cap_s: [sys.executable, "-c", code, str(path)],
    )
    return bench_gpu.start_item(ITEM, tmp_path, False, cap_s)


def test_an_item_stopped_at_its_cap_keeps_what_it_measured(monkeypatch, tmp_path):
    code = LEFT + "import time; print('still here', flush=True); time.sleep(60)"
    found = in_a_process(monkeypatch, tmp_path, code, cap_s=3.0)
    assert found["status"] == "capped" and found["reason"] == "stopped at its cap of 3 s"
    assert found["tokens_per_second"] == 100.0 and "still here" in found["output"]
    found = bench_gpu.beside_published(ITEM, found)
    assert found["published"]["tokens_per_second"]["ours_is"] == 0.5
    row = bench_gpu.line_of("some", found)
    assert "capped: stopped at its cap" in row and "[200 tokens/s on one H100: 0.50 of it]" in row


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by the system"),
        ("raise SystemExit(7)", "ended with code 7"),
        ("", "ended with code 0"),
    ],
)
def test_an_item_that_says_nothing_is_named_by_its_end(code, reason, monkeypatch, tmp_path):
    found = in_a_process(monkeypatch, tmp_path, LEFT + code)
    assert found["status"] == "failed" and found["reason"].startswith(reason)


def test_what_an_item_starts_ends_with_it(monkeypatch, tmp_path):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{child}'])"
    found = in_a_process(monkeypatch, tmp_path, code + "; print(p.pid, flush=True)")
    pid = int(found["output"].split()[-1])
    state = Path(f"/proc/{pid}/stat")
    ends = time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] not in ("Z", "X"):
        assert time.monotonic() < ends, "the child of an item outlived it"
        time.sleep(0.05)


def test_the_reason_of_an_error_is_its_own_line(monkeypatch, tmp_path):
    def fails(report, tiny):
        report.add(peak_gib=2.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(gpu_parity, "kernels", fails)
    path = tmp_path / "kernels.json"
    with pytest.raises(torch.OutOfMemoryError):
        bench_gpu.run_item(BY_NAME["kernels"], path, True, 300)
    found = json.loads(path.read_text())
    assert found["status"] == "failed" and found["peak_gib"] == 2.0
    assert found["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"


def test_steps_end_before_the_cap(tmp_path):
    report = Report(tmp_path / "found.json", cap_s=3.0 + 0.5)  # 3 s are kept for the end
    taken = []

    def step() -> Step:
        taken.append(len(taken))
        time.sleep(0.2)
        return Step(loss=1.0, num_terms=1, tokens=50)

    measure(report, step, operations=2e11)
    assert 1 <= len(taken) <= 3
    figures = json.loads(report.path.read_text())
    assert figures["tokens_per_second"] == pytest.approx(250, rel=0.3)
    assert figures["model_tflops"] == pytest.approx(1.0, rel=0.3)


def test_parity_wants_losses_norms_and_the_fall_of_the_loss():
    plain = ([10.0, 9.5, 9.0], [2.0, 2.0, 2.0])
    good = gpu_parity.compared(([10.1, 9.55, 9.05], [2.05, 2.0, 1.98]), plain)
    assert good["ok"] and good["differences"]["fall"] == pytest.approx(0.05)
    # an update that does half of what it should, one that sees another gradient, no norm at all
    assert not gpu_parity.compared(([10.0, 9.75, 9.5], [2.0, 2.0, 2.0]), plain)["ok"]
    assert not gpu_parity.compared(([10.0, 9.5, 9.0], [1.0, 2.0, 2.0]), plain)["ok"]
    assert not gpu_parity.compared(([10.0, 9.5, 9.0], [None, 2.0, 2.0]), plain)["ok"]


@pytest.mark.parametrize("shape", [gpu_models.LLAMA3_8B, gpu_models.QWEN3_4B])
def test_weights_are_those_of_the_model(shape):
    small = gpu_models.tiny(shape)
    model = gpu_models.model_of(small)
    layers, head, _ = gpu_models.weights_of(small)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert layers + head == sum(m.weight.numel() for m in linear)


def test_weights_of_adapters_are_those_of_the_model():
    from benchmarks.gpu_training import RANK, adapted

    small = gpu_models.tiny(gpu_models.LLAMA3_8B)
    trained = [p.numel() for p in adapted(small).parameters() if p.requires_grad]
    assert sum(trained) == gpu_models.adapter_weights(small, RANK)


def test_the_arithmetic_of_a_step():
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 10}
    # q and o: 2 x 16, k and v: 2 x 8, mlp: 3 x 32 = 144; head: 40
    assert gpu_models.weights_of(shape) == (144, 40, 4)
    attention = 2 * 1 * 4 * (3 * 3 + 5 * 5)
    full = 6 * (144 * 8 + 40 * 6) + 3 * attention
    assert gpu_models.flops(shape, [3, 5], 6) == full
    # rank 2: (4 + 4) x 2 for q and o, (4 + 2) x 2 for k and v, (4 + 8) x 3 for the mlp
    adapters = 2 * (2 * 8 + 2 * 6 + 3 * 12)
    lora = 4 * (144 * 8 + 40 * 6) + 3 * attention + 6 * adapters * 8
    assert gpu_models.flops(shape, [3, 5], 6, rank=2) == lora
    reference = 2 * (144 * 8 + 40 * 6) + attention
    assert gpu_models.flops(shape, [3, 5], 6, extra=1) == full + reference


def test_a_published_rate_is_what_the_arithmetic_gives():
    """12,473 tokens/s of LoRA on Llama-3-8B at 4096 were published as 402 TFLOP/s."""
    shape = gpu_models.LLAMA3_8B
    work = gpu_models.flops(shape, [4096], 4095, rank=16)
    assert 12473 / 4096 * work / 1e12 == pytest.approx(402, rel=0.1)


def test_the_peak_of_a_device_is_found_by_its_name():
    assert gpu_models.peak_tflops("NVIDIA H200") == 989
    assert gpu_models.peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert gpu_models.peak_tflops("some other") is None
