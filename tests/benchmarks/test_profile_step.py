"""The profile of a step: its parts are the whole, every matrix product that the mathematics asks
for is seen, and the floors are what a hand works out."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import op_classes, profile_step, profile_table, work_floors
from benchmarks.online_case import Size, flops
from benchmarks.op_classes import Product, own_part, product_of
from benchmarks.work_floors import Work
from tests.distributed.spawn import run

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 97,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
}
# One layer: queries and output 2 x 4 x 4, keys and values 2 x 4 x 2, MLP 3 x 4 x 8: 144 weights;
# vocabulary 4 x 10.
BY_HAND = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
LENGTHS = {"prompt": 6, "short": 1, "long": 4}
ROWS = ([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]], [3, 2])
PAIRS = [{"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [11, 12, 13]}] * 2


class NoRates:
    def measure(self) -> None:
        pass

    def medians(self) -> dict[str, float]:
        return {"matmul": 1e9, "onednn": 2e9, "read": 1e9, "copied": 2e9}


def profiles_of(folder: str) -> dict[str, dict]:
    """In a worker: the figures of each case on a tiny model, and the flops of its products."""
    from pathlib import Path

    from benchmarks import profile_case, sft_case

    sft_case.CACHE = Path(folder)
    given = {
        "sft": {"rows": ROWS},
        "dpo": {"pairs": PAIRS},
        "rm": {"pairs": PAIRS},
        "ppo": {"size": Size(prompts=2, new=4)},
        "grpo": {"size": Size(prompts=1, new=4, generations=3)},
        "decode_8": {"lengths": LENGTHS},
    }
    found = {}
    cases = profile_case.cases()
    for name, keywords in given.items():
        timed = profile_step.Timed(2, 2, TINY["vocab_size"], NoRates(), warm_up=1)
        with op_classes.marked():
            done = cases[name]("tiny", timed, model=TINY, **keywords)
        done_flops = {
            kind: [
                sum(product.flops * entry[1] for product, entry in one.products.items())
                for one in timed.found[kind]
            ]
            for kind in done.kinds
        }
        # Of one step as it was profiled: a token's figures are differences, which on a busy machine
        # may be anything.
        one = timed.found[done.kinds[0]][0]
        found[name] = profile_step.figures(timed, done) | {
            "product_flops": done_flops,
            "one_step": dict(one.parts),
            "one_step_sizes": [str(product) for product in one.products],
        }
    return found


@pytest.fixture(scope="module")
def profiles(tmp_path_factory) -> dict[str, dict]:
    folder = str(tmp_path_factory.mktemp("profiles"))
    entry = "tests.benchmarks.test_profile_step:profiles_of"
    return run(1, entry, folder, env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})[0]


def test_the_parts_are_the_whole_and_hardly_any_operator_is_unknown(profiles):
    for name, row in profiles.items():
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=1e-9), name
        assert row["steps"] == 2 and row["profiled"] == 2
        one = row["one_step"]
        assert one.get(op_classes.OTHER, 0.0) < 0.02 * sum(one.values()), name


@pytest.mark.parametrize("name", ["sft", "dpo", "rm", "ppo", "grpo", "decode_8"])
def test_each_case_has_the_parts_of_its_kind_and_no_others(profiles, name):
    parts = profiles[name]["one_step"]
    trains = name != "decode_8"
    samples = name in ("ppo", "grpo", "decode_8")
    for part in (op_classes.PRODUCTS, op_classes.ATTENTION, op_classes.ELEMENTWISE):
        assert parts[part] > 0
    assert (op_classes.OPTIMIZER in parts) == trains
    assert (op_classes.SAMPLING in parts) == samples
    # A reward model has no vocabulary head; its embedding has the vocabulary's size all the same.
    head = [size for size in profiles[name]["one_step_sizes"] if "97" in size.split(" x ")]
    assert bool(head) == (name != "rm")


def test_every_product_that_the_mathematics_asks_for_is_seen_and_none_besides(profiles):
    from benchmarks import sft_case

    lengths = [len(row) for row in ROWS[0]]
    attention = 6 * TINY["num_hidden_layers"] * TINY["hidden_size"] * sum(n * n for n in lengths)
    needed = sft_case.flops(lengths, sum(ROWS[1]), TINY) - attention
    # transformers 4 multiplies rotary frequencies by positions as a product, 160 operations here; a
    # product of the mathematics that was missed would be 10,000 or more.
    assert profiles["sft"]["product_flops"]["step"] == pytest.approx([needed] * 2, rel=1e-3)
    weights = sft_case.block_weights(TINY) + TINY["hidden_size"] * TINY["vocab_size"]
    found = profiles["decode_8"]["product_flops"]
    for long, short in zip(found["long"], found["short"], strict=True):
        # three more tokens of eight rows
        assert long - short == pytest.approx(3 * 8 * 2 * weights, rel=1e-3)


def test_a_token_is_the_difference_of_two_batches(profiles):
    row = profiles["decode_8"]
    assert row["unit"] == "token" and row["tokens"] == 8
    assert row["floors"]["gflop"] == pytest.approx(
        work_floors.token(TINY, 8, LENGTHS["prompt"] + 2.5).flops / 1e9
    )


def test_phases_of_an_episode_stand_beside_their_floors(profiles):
    for name, phases in (
        ("ppo", ["rollout", "scoring", "update"]),
        ("grpo", ["rollout", "update"]),
    ):
        row = profiles[name]
        assert list(row["floors"]["pieces"]) == phases
        assert 0 < sum(row[phase] for phase in phases) <= row["seconds"] * 1.5
        text = profile_table.table(name, row)
        assert all(f"    {phase}" in text for phase in phases)


# Floors, by hand


def test_the_floor_of_a_training_step():
    assert work_floors.parameters(BY_HAND) == 184
    assert work_floors.parameters(BY_HAND | {"tie_word_embeddings": False}) == 224
    # Weights read twice, gradients written, and AdamW's four reads and three writes.
    work = work_floors.sft(BY_HAND, [3, 2], 4)
    assert work == Work(6 * 144 * 5 + 6 * 40 * 4 + 6 * 4 * (9 + 4), 184 * 4 * 10)
    assert work.seconds(1.0, 1e9) == work.flops and work.seconds(1e9, 1.0) == work.bytes


def test_the_floor_of_pairs_with_their_prompt_twice_and_once():
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]}
    rows = 6 * 144 * (4 + 5) + 6 * 4 * (16 + 25)
    prompt = 6 * 144 * 3 + 6 * 4 * 9
    reward = work_floors.pairs(BY_HAND, [pair], "rm", shared=False)
    assert reward == Work(rows, 184 * 4 * 10)
    assert work_floors.pairs(BY_HAND, [pair], "rm", shared=True).flops == rows - prompt
    head = 6 * 40 * 3
    # The reference's forward pass is a third of forward and backward, and reads its own weights.
    dpo = work_floors.pairs(BY_HAND, [pair], "dpo", shared=False)
    assert dpo.flops == pytest.approx((rows + head) * 4 / 3)
    assert dpo.bytes == 184 * 4 * 11


def test_the_floor_of_a_token():
    # Both rows: every weight twice; scores and values with 7 tokens, 4 wide.
    work = work_floors.token(BY_HAND, 2, 7.0)
    assert work.flops == 2 * (2 * 184 + 4 * 4 * 7)
    # Weights, and keys and values of two rows, 2 wide.
    assert work.bytes == 4 * (184 + 2 * 2 * 7 * 2)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_pieces_of_an_episode_are_its_arithmetic(algorithm):
    size = Size(prompts=2, new=3, generations=2, passes=2)
    pieces = work_floors.episode(algorithm, size, [5, 5], BY_HAND)
    total = sum(work.flops for piece in pieces.values() for work in piece)
    assert total == pytest.approx(flops(algorithm, size, [5, 5], BY_HAND))
    assert len(pieces["rollout"]) == size.new  # the prompts, and each token but the first
    assert all(work.flops > 0 and work.bytes > 0 for piece in pieces.values() for work in piece)


def test_an_episode_waits_for_the_larger_floor_of_every_piece():
    pieces = [Work(10.0, 1.0), Work(1.0, 10.0)]
    assert work_floors.seconds(pieces, 1.0, 1.0) == 20.0
    found = work_floors.as_json(pieces, 1.0, 1.0)
    assert (found["arithmetic_seconds"], found["memory_seconds"]) == (11.0, 11.0)


# Operators


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("aten::mm", [[6, 32], [32, 64]], op_classes.PRODUCTS),
        ("aten::addmm_", [[6, 64], [6, 32], [32, 64]], op_classes.PRODUCTS),
        ("mkldnn::_linear_pointwise", [[6, 32], [64, 32]], op_classes.PRODUCTS),
        ("aten::mm", [[6, 32], [32, 97]], op_classes.HEAD),
        ("aten::mm", [[97, 6], [6, 32]], op_classes.HEAD),
        ("aten::exp_", [[6, 97]], op_classes.HEAD),
        ("aten::exp_", [[6, 96]], op_classes.ELEMENTWISE),
        ("aten::silu_backward", [[6, 64], [6, 64]], op_classes.ELEMENTWISE),
        ("Torch-Compiled Region: 0/0", [], op_classes.ELEMENTWISE),
        ("aten::copy_", [[6, 32], [6, 32]], op_classes.COPIES),
        ("aten::cat", [[[6, 32], [6, 32]]], op_classes.COPIES),
        ("aten::embedding_dense_backward", [[6, 32], [6]], op_classes.EMBEDDING),
        ("aten::_fused_adamw_", [], op_classes.OPTIMIZER),
        ("Optimizer.step#AdamW.step", [], op_classes.OPTIMIZER),
        ("c10d::allreduce_", [], op_classes.WAITING),
        ("aten::view", [[6, 97]], op_classes.DISPATCH),
        ("MmBackward0", [], op_classes.DISPATCH),
        ("autograd::engine::evaluate_function: MmBackward0", [], op_classes.DISPATCH),
        ("FromHiddenBackward", [[6, 32]], op_classes.PYTHON),
        ("somewhere::unheard_of", [[6, 97]], op_classes.OTHER),
    ],
)
def test_the_part_of_an_operator(name, shapes, part):
    assert own_part(name, shapes, 97) == part


def test_what_calls_a_product_is_none_itself():
    assert own_part("aten::linear", [[6, 32], [64, 32]], 97, calls_product=True) == "dispatch"
    assert own_part("aten::linear", [[6, 32], [64, 32]], 97) == op_classes.PRODUCTS


def test_sizes_of_products():
    assert product_of("aten::mm", [[6, 32], [32, 64]]) == Product(1, 6, 32, 64)
    assert product_of("aten::addmm", [[64], [6, 32], [32, 64], [], []]) == Product(1, 6, 32, 64)
    assert product_of("aten::addmm_", [[6, 64], [6, 32], [32, 64]]) == Product(1, 6, 32, 64)
    assert product_of("aten::bmm", [[3, 6, 32], [3, 32, 64]]) == Product(3, 6, 32, 64)
    packed = [[2, 3, 32], [5000], [64, 32], [], []]
    assert product_of("mkl::_mkl_linear", packed) == Product(1, 6, 32, 64)
    added = [[6, 32], [6, 32], [32, 32], [], []]  # a residual of the weight's width
    assert product_of("mkldnn::_linear_pointwise", added) == Product(1, 6, 32, 32)
    assert product_of("aten::mul", [[6, 32], [6, 32]]) is None
    assert Product(3, 6, 32, 64).flops == 2 * 3 * 6 * 32 * 64


def event(name: str, seconds: float, *children, shapes=(), thread: int = 1) -> SimpleNamespace:
    made = SimpleNamespace(
        name=name,
        self_cpu_time_total=1e6 * seconds,
        input_shapes=list(shapes),
        cpu_children=list(children),
        cpu_parent=None,
        thread=thread,
        time_range=(0, 1),
    )
    for child in children:
        child.cpu_parent = made
    return made


def tree(root: SimpleNamespace) -> list[SimpleNamespace]:
    return [root, *(each for child in root.cpu_children for each in tree(child))]


def test_what_an_operator_calls_belongs_to_it_where_it_is_attention_or_a_marked_moment():
    linear = event("aten::linear", 1.0, event("aten::mm", 4.0, shapes=[[6, 32], [32, 64]]))
    attention = event(
        "aten::scaled_dot_product_attention",
        2.0,
        event("aten::bmm", 8.0, shapes=[[2, 6, 8], [2, 8, 6]]),
        event("aten::softmax", 16.0),
    )
    sampling = event(f"{op_classes._MARK}sampling", 32.0, event("aten::mm", 64.0))
    other_thread = event("aten::mul", 128.0, thread=2)
    events = [each for root in (linear, attention, sampling, other_thread) for each in tree(root)]
    found = op_classes.attribute(events, 97)
    assert dict(found.parts) == {
        op_classes.PRODUCTS: 4.0,
        op_classes.DISPATCH: 1.0,
        op_classes.ATTENTION: 26.0,
        op_classes.SAMPLING: 64.0,
        op_classes.PYTHON: 32.0,  # between the operators of the marked moment
    }
    assert list(found.products) == [Product(1, 6, 32, 64)] and found.events == 7


def test_marked_moments_are_given_back_and_a_renamed_one_is_named(monkeypatch):
    from coati.parallel.engine import Engine

    original = Engine._update
    with op_classes.marked():
        assert Engine._update is not original
    assert Engine._update is original
    monkeypatch.setitem(op_classes.MARKED, ("coati.parallel.engine", "Engine", "gone"), "x")
    with pytest.raises(AttributeError, match="Engine has no gone any more"), op_classes.marked():
        pass
    assert Engine._update is original


# Figures and their table


def test_operators_that_the_profiler_slowed_are_said_not_hidden():
    parts = profile_step.split(10.0, {op_classes.PRODUCTS: 6.0, op_classes.ELEMENTWISE: 3.0})
    assert (parts[op_classes.PYTHON], parts["over"]) == (1.0, 0.0)
    parts = profile_step.split(10.0, {op_classes.PRODUCTS: 9.0, op_classes.ELEMENTWISE: 3.0})
    assert (parts[op_classes.PYTHON], parts["over"]) == (0.0, -2.0)
    assert sum(parts.values()) == 10.0


def test_profiled_steps_are_spread_among_the_others():
    assert profile_step.turns(4, 2) == ["plain", "plain", "profiled"] * 2
    assert profile_step.turns(2, 4) == ["plain", "profiled", "profiled"] * 2


def test_the_table_says_shares_and_what_was_before(profiles):
    row = profiles["sft"]
    before = json.loads(json.dumps(row)) | {"seconds": 3 * row["seconds"]}
    text = profile_table.table("sft", row, before)
    assert "now 3.00 x as fast" in text and "100%" in text
    assert all(part in text for part in op_classes.PARTS)
    half = row["floors"]["seconds"] / row["seconds"]
    assert f"floor: {profile_table._time(row['floors']['seconds'])}, {half:.0%} of it" in text
    # oneDNN's product is twice as fast here, and the memory's floor the same.
    assert row["floors_onednn"]["arithmetic_seconds"] == pytest.approx(
        row["floors"]["arithmetic_seconds"] / 2
    )


def test_unknown_cases_are_refused_with_the_ones_there_are(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["profile_step.py", "sftt"])
    with pytest.raises(SystemExit):
        profile_step.parse()
    assert "no case 'sftt'; there are sft, dpo, rm, ppo" in capsys.readouterr().err


def test_rates_are_medians_of_what_was_measured():
    from benchmarks.machine_rates import MachineRates, bandwidth

    rates = MachineRates(size=64, read_bytes=2**16)
    for _ in range(3):
        rates.measure()
    rates.samples["read"] = [1.0, 5.0, 3.0]
    found = rates.medians()
    assert found["read"] == 3.0 and found["matmul"] > 0 and found["copied"] > 0
    assert bandwidth({"read": 3.0, "copied": 2.0}) == 3.0
    assert bandwidth({"read": 3.0, "copied": 2.0, "weights": 4.0}) == 4.0
