"""Means over unequal numbers of samples, worked out by hand."""

import json

import torch

from coati.utils.meter import AccumulativeMeanMeter
from tests.distributed.spawn import run


def test_every_sample_weighs_the_same_however_they_are_batched():
    meter = AccumulativeMeanMeter()
    meter.add("reward", torch.tensor([1.0, 2.0, 3.0]))
    meter.add("reward", torch.tensor([[10.0]]))
    assert meter.get("reward") == 4.0  # 16 / 4, not the mean 6 of the two batches' means
    assert meter.report() == {"reward": 4.0} and meter.report() == {}


def test_a_number_may_stand_for_several_samples():
    meter = AccumulativeMeanMeter()
    meter.add("length", 10.0, count_update=3)
    meter.add("length", 2.0)
    assert meter.report() == {"length": 8.0}


def test_an_empty_tensor_is_no_sample():
    meter = AccumulativeMeanMeter()
    meter.add("rejected", torch.zeros(0))
    assert meter.get("rejected") == 0.0 and meter.get("never") == 0.0 and meter.report() == {}
    meter.add_all({"chosen": [torch.tensor([1.0]), torch.zeros(0), torch.tensor([2.0])]})
    assert meter.report() == {"chosen": 1.5}


def test_booleans_and_half_precision_are_added_up_exactly():
    meter = AccumulativeMeanMeter()
    meter.add("accuracy", torch.tensor([True, False, True, True]))
    meter.add(
        "half", torch.full((4096,), 1.001, dtype=torch.bfloat16)
    )  # in bf16 a sum stops growing at 256
    report = meter.report()
    assert report == {"accuracy": 0.75, "half": float(torch.tensor(1.001, dtype=torch.bfloat16))}


def report_of_rank(rank_samples: list[list[float]]) -> dict[str, float]:
    """In a worker: this rank's samples under one name, and under one that rank 1 alone has."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    meter = AccumulativeMeanMeter()
    meter.add("loss", torch.tensor(rank_samples[dist.get_rank()]))
    if dist.get_rank() == 1:
        meter.add("rare", 7.0)
    return meter.report()


def test_ranks_with_unequal_numbers_of_samples_weigh_by_sample():
    reports = run(2, "tests.utils.test_meter:report_of_rank", [[1.0], [4.0, 4.0, 3.0]])
    assert reports == [{"loss": 3.0, "rare": 7.0}] * 2


def test_what_is_not_reported_yet_outlives_the_meter():
    meter, other = AccumulativeMeanMeter(), AccumulativeMeanMeter()
    meter.add("reward", torch.tensor([0.1, 0.2]))
    other.add("forgotten", 1.0)
    other.load(json.loads(json.dumps(meter.state_of_ranks())))
    for each in (meter, other):
        each.add("reward", torch.tensor([0.7]))
    assert other.report() == meter.report()


def test_a_ratio_is_of_sums_and_the_largest_is_kept_apart():
    meter = AccumulativeMeanMeter()
    meter.add_ratio("speed", 10.0, 2.0)
    meter.add_ratio("speed", torch.tensor(20.0), 4.0)
    for value in (3.0, 7.0, 5.0):
        meter.add_largest("memory", value)
    assert "memory" not in meter.state_of_ranks()[0]
    assert meter.report() == {"speed": 5.0, "memory": 7.0} and meter.report() == {}


def continued(states: list) -> dict[str, float]:
    """In a worker: a report of what ``states`` hold and a sample of 1.0 on rank 0 and 2.0 on rank
    1."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    meter = AccumulativeMeanMeter()
    meter.load(states)
    meter.add("loss", float(dist.get_rank() + 1))
    return meter.report()


def test_another_number_of_ranks_takes_all_of_it():
    """Sums 3 over 2 samples, 4 over 1 and 5 over 1, then the new samples 1 and 2: (3 + 4 + 5 + 1 +
    2) / 6."""
    states = [{"loss": [3.0, 2.0]}, {"loss": [4.0, 1.0]}, {"loss": [5.0, 1.0]}]
    assert run(2, "tests.utils.test_meter:continued", states) == [{"loss": 2.5}] * 2
