"""Where the weights of a model that is not trained are, and when."""

from types import SimpleNamespace

import pytest
import torch

from coati.experience_maker.experience import Experience
from coati.experience_maker.model_inputs import scores
from coati.models.fused_layers import MARK
from coati.parallel.inference_model import InferenceModel, boost_for_inference
from coati.parallel.options import ParallelOptions
from tests.experience_maker.engines import group_of_one
from tests.experience_maker.stubs import StubEngine
from tests.tiny import tiny_llama


class Moved(torch.nn.Module):
    """Notes where it is sent, and where it is when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[str] = []

    def to(self, device) -> "Moved":
        self.at.append(str(device))
        return self


def reference(offload: bool) -> InferenceModel:
    module = Moved()

    def forward_only(batch, read, head_request=None, rows_together=None):
        module.at.append("asked")
        return torch.ones(len(batch["input_ids"]))

    engine = SimpleNamespace(
        module=module,
        device="cpu:0",
        forward_only=forward_only,
        token_budget=StubEngine().token_budget,
    )
    return InferenceModel(engine, offload=offload)


def four_rows() -> Experience:
    ids, mask = torch.ones(4, 5, dtype=torch.long), torch.ones(4, 5, dtype=torch.bool)
    numbers = torch.zeros(4, 2)
    return Experience(ids, mask, mask[:, :2], numbers, numbers[:, 0], torch.arange(4))


def test_an_offloaded_model_is_on_the_device_for_all_its_batches_once():
    model = reference(offload=True)
    assert model.engine.module.at == ["cpu"]
    assert scores(model, four_rows(), 2).tolist() == [1.0] * 4
    assert model.engine.module.at == ["cpu", "cpu:0", "asked", "asked", "cpu"]


def test_an_error_leaves_it_in_host_memory():
    model = reference(offload=True)
    with pytest.raises(RuntimeError), model.on_device():
        raise RuntimeError
    assert model.engine.module.at == ["cpu", "cpu:0", "cpu"]


def test_otherwise_it_stays_where_it_is():
    model = reference(offload=False)
    scores(model, four_rows(), 2)
    assert model.engine.module.at == ["asked", "asked"]


def test_weights_stored_in_half_precision_run_in_fused_layers(tmp_path):
    """As those of fp32 files: kernels are chosen for the precision that a model is run in."""
    model = tiny_llama().to(torch.bfloat16)
    with group_of_one(tmp_path):
        engine = boost_for_inference(model, ParallelOptions(plugin="ddp", precision="fp32"))
    norms = [layer for layer in engine.module.modules() if type(layer).__name__ == "LlamaRMSNorm"]
    assert norms and all(MARK in vars(layer) for layer in norms)
