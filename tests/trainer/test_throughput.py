"""What is logged of a run's speed, of engines whose work is known."""

from types import SimpleNamespace

import pytest
import torch

from coati.parallel.footprint.model_flops import PassFlops
from coati.parallel.options import ParallelOptions
from coati.parallel.step_work import PassWork, StepClock
from coati.trainer import throughput as module
from coati.trainer.throughput import Throughput, precision_of
from coati.utils.meter import AccumulativeMeanMeter
from tests.distributed.spawn import run


def engine(loss_rank=True, unknown: str = "", plugin=None, mixed=None, dtype=torch.float32):
    work = PassWork(PassFlops(2.0, 0.0, 0.0), PassFlops(6.0, 0.0, 0.0))
    work.unknown = unknown
    return SimpleNamespace(
        mesh=SimpleNamespace(is_loss_rank=loss_rank),
        device="cpu",
        plugin=plugin,
        options=ParallelOptions(precision="fp32"),
        booster=SimpleNamespace(mixed_precision=mixed),
        dtype=dtype,
        work=work,
        clock=StepClock(),
    )


BATCH = {"attention_mask": torch.ones(2, 5)}  # 60 FLOPs trained, 20 forward


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    monkeypatch.setattr(module, "peak_rate", lambda device, precision: 40.0)
    monkeypatch.setattr(module, "peak_memory_mb", lambda: 123.0)


def test_flops_a_second_beside_the_peak():
    trained = engine()
    reference = engine()
    made = Throughput(trained, [reference, trained])  # named twice, counted once
    made.prepare()
    meter = AccumulativeMeanMeter()
    trained.work.add_batch(BATCH, trained=True)
    reference.work.add_batch(BATCH, trained=False)
    trained.clock.add("forward", 1.0)
    reference.clock.add("forward", 0.5)
    made.clock.add("data", 0.25)
    made.count(3.0, steps=1)
    trained.clock.add("forward", 0.5)
    made.count(1.0, steps=1)
    made.add_to(meter)
    found = made.metrics(meter.report())
    assert found == {
        "model_tflops_per_second": 80 / 4 / 1e12,
        "mfu": 80 / 4 / 40,
        "seconds_forward": 1.0,  # a step
        "seconds_data": 0.125,
        "peak_memory_mb": 123.0,
    }
    made.add_to(meter)
    left = made.metrics(meter.report())
    assert left == {"peak_memory_mb": 123.0}  # nothing was done


def test_a_checkpoint_between_two_reports_loses_nothing():
    trained = engine()
    made = Throughput(trained)
    made.prepare()
    meter = AccumulativeMeanMeter()
    trained.work.add_batch(BATCH, trained=True)
    made.count(2.0, steps=1)
    made.add_to(meter)
    resumed = AccumulativeMeanMeter()
    resumed.load(meter.state_of_ranks())
    again = engine()
    made = Throughput(again)
    made.prepare()
    again.work.add_batch(BATCH, trained=True)
    made.count(1.0, steps=1)
    made.add_to(resumed)
    assert made.metrics(resumed.report())["mfu"] == 120 / 3 / 40


def test_what_was_computed_before_training_counts_for_nothing():
    trained = engine()
    made = Throughput(trained)
    trained.work.add_batch(BATCH, trained=False)  # reference log-probs of all rows, say
    trained.clock.add("prepare", 5.0)
    made.prepare()
    meter = AccumulativeMeanMeter()
    trained.work.add_batch(BATCH, trained=True)
    made.count(2.0, steps=1)
    made.add_to(meter)
    found = made.metrics(meter.report())
    assert found == {
        "model_tflops_per_second": 60 / 2 / 1e12,
        "mfu": 60 / 2 / 40,
        "peak_memory_mb": 123.0,
    }


def test_the_precision_of_a_model_that_the_caller_boosted_is_the_plugins():
    """Each plugin of ColossalAI 0.5.0 keeps it in a place of its own."""
    from colossalai.booster.mixed_precision import mixed_precision_factory

    gemini = SimpleNamespace(gemini_config={"mixed_precision": torch.float16})
    assert precision_of(engine(plugin=SimpleNamespace(precision="bf16"))) == "bf16"
    assert precision_of(engine(plugin=gemini)) == "fp16"
    assert precision_of(engine(mixed=mixed_precision_factory("fp16"))) == "fp16"
    assert precision_of(engine(dtype=torch.bfloat16)) == "bf16"
    assert precision_of(engine()) == "fp32"


def test_what_an_evaluation_computes_counts_for_nothing():
    trained = engine()
    made = Throughput(trained)
    trained.work.add_batch(BATCH, trained=True)
    with made.paused():
        trained.work.add_batch(BATCH, trained=False)
        with trained.clock.timed("reference"):
            pass
    assert float(trained.work.take()) == 60.0 and trained.clock.take() == {}
    with trained.clock.timed("reference"):
        pass
    assert "reference" in trained.clock.take()


def test_what_is_not_known_is_said_and_left_out(monkeypatch, capfd):
    made = Throughput(engine(unknown="there is no formula for family 'other'"))
    made.prepare()
    assert "no MFU are logged: there is no formula for family 'other'" in capfd.readouterr().err
    meter = AccumulativeMeanMeter()
    made.count(1.0, steps=1)
    made.add_to(meter)
    assert made.metrics(meter.report()) == {"peak_memory_mb": 123.0}
    monkeypatch.setattr(module, "peak_rate", lambda device, precision: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    trained = engine()
    made = Throughput(trained)
    made.prepare()
    assert "the peak rate of Some GPU in fp32 is not known" in capfd.readouterr().err
    trained.work.add_batch(BATCH, trained=True)
    made.count(1.0, steps=1)
    made.add_to(meter)
    assert made.metrics(meter.report()) == {
        "model_tflops_per_second": 60 / 1e12,
        "peak_memory_mb": 123.0,
    }


def test_the_line_at_the_end_weighs_reports_by_their_time():
    made = Throughput(engine())
    assert made.summary() == ""
    one = {"tokens_per_second": 100.0, "model_tflops_per_second": 1.0, "mfu": 0.5}
    made.logged(one, 3.0)
    made.logged({name: 2 * value for name, value in one.items()}, 1.0)
    assert made.summary() == (
        "mean speed: 125 tokens/s, 1.25 model TFLOP/s, "
        "MFU 62.5% of the measured matrix rate in fp32"
    )


def test_the_line_at_the_end_of_rollouts_weighs_them_by_their_own_time():
    made = Throughput(engine(), rate="tokens/s of rollouts")
    made.logged({"tokens_per_second": 100.0, "mfu": 0.5}, 4.0, of_tokens=1.0)
    made.logged({"tokens_per_second": 200.0, "mfu": 0.25}, 4.0, of_tokens=3.0)
    assert made.summary() == (
        "mean speed: 175 tokens/s of rollouts, MFU 37.5% of the measured matrix rate in fp32"
    )


def two_ranks() -> dict[str, float]:
    """In a worker: ranks that take 1 and 3 s; the second holds a part of the first one's model."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    module.peak_rate = lambda device, precision: 40.0
    module.peak_memory_mb = lambda: 100.0 + rank
    trained = engine(loss_rank=rank == 0)
    made = Throughput(trained)
    made.prepare()
    trained.work.add_batch(BATCH, trained=True)
    made.count(1.0 + 2 * rank, steps=1)
    meter = AccumulativeMeanMeter()
    made.add_to(meter)
    return made.metrics(meter.report())


def test_several_processes():
    for found in run(2, "tests.trainer.test_throughput:two_ranks"):
        assert found == {
            "model_tflops_per_second": 2 * 60 / 4 / 1e12,  # by 2 processes of 4 s in all
            "mfu": 60 / 4 / 40,
            "peak_memory_mb": 101.0,
        }
