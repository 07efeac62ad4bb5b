"""Steps of each optimizer by hand, its states through a checkpoint, and what cannot have it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coati.models.lora.lora import LoraConfig, apply_lora
from coati.parallel import optimizer as built
from coati.parallel.optimizer import OptimizerSettings, build_optimizer
from coati.parallel.optimizer_table import OPTIMIZERS, installed_problem, optimizer_problem
from coati.parallel.options import ParallelOptions
from coati.utils.packages import release_of
from tests.tiny import tiny_llama

DDP = ParallelOptions(plugin="ddp")
LR, DECAY = 0.1, 0.5
HERE = [
    name for name, row in OPTIMIZERS.items() if not row.cuda and installed_problem(name) is None
]
needs_muon = pytest.mark.skipif("muon" not in HERE, reason="torch has no Muon")


class Parts(nn.Module):
    """An embedding, a hidden matrix with a bias, and a head."""

    def __init__(self, rows: int = 80, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(rows, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


def made(name: str, model: nn.Module, **changes) -> torch.optim.Optimizer:
    values = {"lr": LR, "weight_decay": DECAY, "optim": name} | changes
    return build_optimizer(model, DDP, OptimizerSettings(**values))


def stepped(name: str, gradients: list[float], weight: float = 1.0, **changes) -> list[float]:
    """One element of the hidden matrix after each step; all elements are alike."""
    model = Parts()
    nn.init.constant_(model.hidden.weight, weight)
    optimizer = made(name, model, **changes)
    seen = []
    for gradient in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        weights = model.hidden.weight.detach()
        assert torch.allclose(weights, weights[0, 0].expand_as(weights))
        seen.append(float(weights[0, 0]))
    return seen


def test_adam_with_moments_in_8_bits():
    """m / (sqrt(v) + eps) is the gradient's sign at first; 8 bits are exact for a block of equal
    numbers, which are its scale."""
    first, second = stepped("adamw8bit", [0.5, -0.25], adam_beta2=0.95)
    assert first == pytest.approx(1 - LR * DECAY - LR, rel=1e-5)
    m = (0.9 * 0.1 * 0.5 - 0.1 * 0.25) / (1 - 0.9**2)
    v = (0.95 * 0.05 * 0.5**2 + 0.05 * 0.25**2) / (1 - 0.95**2)
    assert second == pytest.approx(first * (1 - LR * DECAY) - LR * m / math.sqrt(v), rel=1e-4)


def test_lion_moves_by_the_sign_of_its_momentum():
    """c = 0.9 m + 0.1 g, m <- 0.99 m + 0.01 g: the second gradient, three times smaller than what
    would turn the momentum, does not; the third does."""
    gradients = [1.0, -0.05, -1.0]
    momentum, weight, expected = 0.0, 1.0, []
    for gradient in gradients:
        sign = math.copysign(1, 0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
        weight = weight * (1 - LR * DECAY) - LR * sign
        expected.append(weight)
    assert [round(b - a, 3) for a, b in zip([1, *expected], expected, strict=False)][1] < 0
    assert stepped("lion", gradients) == pytest.approx(expected, rel=1e-5)


def test_adafactor_moves_by_a_share_of_the_weights_size():
    """A matrix whose squares are a row times a column has them exactly: the step is the gradient's
    sign, times lr and the root mean square of the weight (before decay)."""
    model = Parts()
    nn.init.constant_(model.hidden.weight, 3.0)
    optimizer = made("adafactor", model)
    columns = torch.arange(1.0, 65)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.hidden.weight.grad = columns[:, None] * -columns.flip(0)[None]
    optimizer.step()
    expected = torch.full((64, 64), 3.0 * (1 - LR * DECAY) + LR * 3.0)
    torch.testing.assert_close(model.hidden.weight.detach(), expected, rtol=1e-4, atol=0.0)
    state = optimizer.state[model.hidden.weight]
    assert state["row_var"].shape == (64, 1) and state["col_var"].shape == (1, 64)


@needs_muon
def test_muon_turns_a_matrix_into_an_orthogonal_one():
    """Of a gradient with equal singular values Newton and Schulz work on one number: x <- 3.4445 x
    - 4.7750 x^3 + 2.0315 x^5, five times from 1 / sqrt(64); the step has 0.2 sqrt(64) times that,
    in 16 bits."""
    model = Parts()
    nn.init.zeros_(model.hidden.weight)
    optimizer = made("muon", model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64))
    model.hidden.weight.grad = 7 * rotation
    optimizer.step()
    x = 1 / 8
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = -LR * 0.2 * 8 * x * rotation
    error = (model.hidden.weight - expected).norm() / expected.norm()
    assert error < 0.03
    assert float(model.hidden.weight.square().mean().sqrt()) == pytest.approx(
        LR * 0.2 * x, rel=0.02
    )


def test_the_heads_of_values_are_no_hidden_matrices():
    from coati.models.ilql_heads import attach
    from coati.parallel.muon import hidden_matrices

    model = tiny_llama()
    plain = len(hidden_matrices(model))
    attach(model)
    assert len(hidden_matrices(model)) == plain > 0


@needs_muon
def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model, alone = Parts(), Parts()
    optimizer = made("muon", model, embedding_lr=1e-3)
    by_kind = {
        (group["muon"], group["lr"]): [tuple(p.shape) for p in group["params"]]
        for group in optimizer.param_groups
    }
    assert by_kind == {
        (False, LR): [(64,)],
        (False, 1e-3): [(80, 64), (80, 64)],
        (True, LR): [(64, 64)],
    }
    references = [
        torch.optim.Muon(
            [alone.hidden.weight],
            lr=LR,
            weight_decay=DECAY,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [alone.hidden.bias]},
                {"params": [alone.embedding.weight, alone.head.weight], "lr": 1e-3},
            ],
            lr=LR,
            weight_decay=DECAY,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]
    for step in range(3):
        torch.manual_seed(step)
        for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for one in (optimizer, *references):
            one.step()
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other)


@needs_muon
def test_weights_of_three_dimensions_are_adamws_and_that_is_said(caplog):
    model = Parts()
    model.experts = nn.Parameter(torch.zeros(2, 64, 64))
    optimizer = made("muon", model)
    assert "1 weights of more than two dimensions" in caplog.text
    (muon,) = [group for group in optimizer.param_groups if group["muon"]]
    assert [id(p) for p in muon["params"]] == [id(model.hidden.weight)]


@needs_muon
def test_muon_of_adapters_alone_has_no_other_group():
    model = Parts()
    for part in (model.embedding, model.head):
        part.requires_grad_(False)
    model.hidden.bias.requires_grad_(False)
    optimizer = made("muon", model)
    model.hidden.weight.grad = torch.ones(64, 64)
    before = model.hidden.weight.detach().clone()
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and not torch.equal(before, model.hidden.weight)


@pytest.mark.parametrize("name", HERE)
def test_lora_plus_is_for_b_of_each_optimizer(name):
    """Of equal gradients A and B make steps of one size in units of their rates; an adapted
    embedding's A has the embedding's rate."""
    targets = ["q_proj", "embed_tokens"]
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=targets))
    ratio, of_embedding = 8, LR / 2
    optimizer = made(
        name, model, lora_plus_ratio=ratio, embedding_lr=of_embedding, weight_decay=0.0
    )
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained) == 6
    before = {}
    for key, parameter in trained.items():
        own = of_embedding if "lora_embedding_A" in key else LR
        assert rates[id(parameter)] == pytest.approx(ratio * LR if "_B." in key else own)
        nn.init.constant_(parameter, 0.5)
        parameter.grad = torch.ones_like(parameter)
        before[key] = parameter.detach().clone()
    optimizer.step()
    moved = {key: float((p - before[key]).abs().mean()) for key, p in trained.items()}
    of_a, of_b = ([size for key, size in moved.items() if f".lora_{x}." in key] for x in "AB")
    assert of_b == pytest.approx([ratio * size for size in of_a], rel=0.02) and min(of_a) > 0


def test_adafactor_says_what_rate_lora_wants(caplog):
    """B is 0, which counts as a root mean square of 1e-3: at a usual rate it would stay there."""
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    options = replace(DDP, lora=True)
    optimizer = build_optimizer(model, options, OptimizerSettings(lr=LR, optim="adafactor"))
    assert "whose B is 0 at first and grows by 1e-3 of that, about 1e-1 is usual" in caplog.text
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, parameter in trained.items():
        if ".lora_B." in key:
            torch.testing.assert_close(parameter, torch.full_like(parameter, -LR * 1e-3))


def test_embeddings_have_moments_in_32_bits():
    model = Parts()
    optimizer = made("adamw8bit", model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kinds = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters()}
    assert kinds == {
        "embedding.weight": torch.float32,
        "hidden.weight": torch.uint8,
        "hidden.bias": torch.float32,  # fewer than 4096 elements
        "head.weight": torch.uint8,
    }


@pytest.mark.parametrize("name", HERE)
def test_the_table_says_how_large_states_are(name):
    """Of large matrices, where a row and a column and the scales' remainders do not count."""
    model = Parts(rows=256, width=256)
    optimizer = made(name, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    size = 256 * 256
    row = OPTIMIZERS[name]
    for part, counts in (
        (model.hidden, (size, 0, 0)),
        (model.embedding, (0, size, 0)),
        (model.head, (0, 0, size)),
    ):
        state = optimizer.state[part.weight]
        held = [t for key, t in state.items() if isinstance(t, torch.Tensor) and "qmap" not in key]
        measured = sum(tensor.nbytes for tensor in held)
        assert measured == pytest.approx(row.state_bytes(*counts), abs=0.04 * size)


@pytest.mark.parametrize("name", HERE)
def test_states_go_through_a_file_to_the_bit(name, tmp_path):
    """Two steps, a checkpoint, two steps; and four steps: the same weights."""

    def walk(model: nn.Module, optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    whole = Parts()
    walk(whole, made(name, whole), range(4))
    first = Parts()
    optimizer = made(name, first)
    walk(first, optimizer, range(2))
    torch.save((first.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    weights, states = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Parts(seed=1)
    second.load_state_dict(weights)
    optimizer = made(name, second)
    optimizer.load_state_dict(states)
    walk(second, optimizer, range(2, 4))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_paged_states_are_paged_again_after_a_resume(monkeypatch):
    from coati.parallel.bitsandbytes_optimizers import PagedAdamW8bit

    def paged(self, parameter, dtype=torch.float32):
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True
        return buffer

    model = Parts()
    optimizer = PagedAdamW8bit(model.parameters(), lr=LR)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = optimizer.state_dict()
    monkeypatch.setattr(PagedAdamW8bit, "get_state_buffer", paged)
    resumed = PagedAdamW8bit(model.parameters(), lr=LR)
    resumed.load_state_dict(states)
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            there = resumed.state[parameter][name]
            assert there.is_paged and torch.equal(there, state[name])


# What cannot be


@pytest.mark.parametrize(
    "name, fields, said",
    [
        ("lion", {"plugin": "gemini"}, "own Adam alone; use --optim adamw, or --plugin zero2"),
        ("adamw8bit", {"plugin": "gemini_auto"}, "--plugin gemini_auto trains with ColossalAI's"),
        ("muon", {"plugin": "zero2"}, "--plugin zero2 gives it flat shards of them; use --plugin"),
        ("muon", {"plugin": "3d", "zero_stage": 1}, "--plugin 3d --zero_stage 1 gives it flat"),
        ("muon", {"plugin": "3d", "tp": 2}, "orthogonalizes whole matrices, and --tp 2 splits"),
        ("adafactor", {"plugin": "zero2_cpu"}, "factors a matrix into a row and a column, and"),
        ("adafactor", {"plugin": "3d", "tp": 2}, "--tp 2 splits them; use --tp 1"),
        ("paged_adamw8bit", {"plugin": "zero2_cpu"}, "where --plugin zero2_cpu has them always"),
        (
            "paged_adamw8bit",
            {"plugin": "3d", "zero_stage": 1, "zero_cpu_offload": True},
            "where --zero_cpu_offload has them always",
        ),
        ("sgd", {}, "--optim sgd: unknown; choose one of adamw, adamw8bit"),
    ],
)
def test_what_a_plugin_cannot_train_with_is_said_by_name(name, fields, said):
    problem = optimizer_problem(name, ParallelOptions(**fields))
    assert problem.startswith(f"--optim {name}") and said in problem


@pytest.mark.parametrize("plugin", ["ddp", "zero2", "zero2_cpu", "3d"])
def test_the_others_can(plugin):
    assert optimizer_problem("adamw8bit", ParallelOptions(plugin=plugin)) is None
    assert optimizer_problem("lion", ParallelOptions(plugin=plugin, tp=1)) is None
    pipeline = ParallelOptions(plugin="3d", pp=2)
    assert optimizer_problem("muon", pipeline) is None
    assert optimizer_problem("adafactor", pipeline) is None


def test_an_older_torch_has_no_muon(monkeypatch):
    from coati.parallel import optimizer_table

    monkeypatch.setattr(optimizer_table, "release_of", lambda name: (2, 5))
    assert installed_problem("muon").startswith(
        "--optim muon came with torch 2.9, installed is 2.5"
    )
    assert installed_problem("adafactor") is None
    assert (release_of("torch") >= (2, 9)) == hasattr(torch.optim, "Muon")


def test_without_bitsandbytes_the_command_is_said(monkeypatch):
    from coati.parallel import optimizer_table

    monkeypatch.setattr(optimizer_table, "find_spec", lambda name: None)
    assert installed_problem("lion").endswith("run: pip install 'bitsandbytes>=0.50'")
    with pytest.raises(ValueError, match="which is not installed"):
        made("adamw8bit", Parts())


def test_a_machine_is_asked_before_a_model_is_loaded(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--optim paged_adamw8bit needs a CUDA GPU"):
            made("paged_adamw8bit", Parts())
    broken = SimpleNamespace(works_on=lambda kind, device: "no kernel", Lion=None)
    monkeypatch.setattr("coati.parallel.bitsandbytes_optimizers", broken)
    problem = built.machine_problem("lion")
    assert "does not run on a" in problem and "(no kernel); use --optim adamw, or: pip" in problem


def test_a_step_that_fails_or_moves_nothing_is_found():
    from coati.parallel.bitsandbytes_optimizers import Lion, works_on

    class Raises(Lion):
        def step(self, closure=None):
            raise RuntimeError("not\nimplemented")

    class Idle(Lion):
        def step(self, closure=None):
            return None

    assert works_on(Lion, "cpu") is None
    assert works_on(Raises, "cpu") == "not"
    assert works_on(Idle, "cpu") == "a step changed nothing"
