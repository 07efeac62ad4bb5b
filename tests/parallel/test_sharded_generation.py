"""Sampling on every plugin that can: the tokens of one plain process, the log-probs of the
update."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from coati.models.generation.loop import generate
from coati.parallel.options import ParallelOptions
from coati.parallel.sharded_generation import cannot_sample, sample
from tests.distributed.spawn import run
from tests.parallel.engine_cases import Case, build_model
from tests.parallel.sampling_cases import PROMPTS, ROWS, SETTINGS, TEMPERATURE, request
from tests.parallel.test_matrix import BF16, SHARDED, cases

FAMILIES = {
    family: {"family": family, "tied": family != "bloom"} for family in ("qwen2", "opt", "bloom")
}

GROUPS: dict[str, tuple[int, list[Case]]] = {
    "ddp": (
        2,
        cases(
            "ddp",
            {},
            {"plain": {}, "bf16": BF16, "lora": {"lora": True}, "bloom": {"family": "bloom"}},
        ),
    ),
    "zero2": (2, cases("zero2", {}, {"plain": {}, "bf16": BF16, "opt": {"family": "opt"}})),
    "zero2_cpu": (2, cases("zero2_cpu", {}, {"plain": {}})),
    "gemini": (2, cases("gemini", BF16, {"plain": {}, "sharded": {"plugin_args": SHARDED}})),
    "gemini_tp": (2, cases("gemini", {"tp": 2, **BF16}, {"plain": {}})),
    "3d_dp": (2, cases("3d", {}, {"plain": {}})),
    "3d_tp": (2, cases("3d", {"tp": 2}, {"plain": {}, "bf16": BF16, "odd": {"vocab_size": 250}})),
    "3d_tp_families": (2, cases("3d", {"tp": 2}, FAMILIES)),
    "3d_tp_dp": (4, cases("3d", {"tp": 2}, {"plain": {}})),
}


@cache
def plain(family: str, tied: bool, vocab_size: int) -> list[list[int]]:
    model = build_model(Case("plain", family=family, tied=tied, vocab_size=vocab_size))
    return generate(
        model, **request(list(range(ROWS))), temperature=TEMPERATURE, **SETTINGS
    ).responses()


@pytest.mark.matrix
@pytest.mark.parametrize("group", GROUPS)
def test_samples_are_those_of_one_plain_process_and_their_log_probs_those_of_the_update(group):
    nproc, members = GROUPS[group]
    ranks = run(nproc, "tests.parallel.sampling_cases:sample_all", members, timeout=300)
    for index, case in enumerate(members):
        found = [rank[index] for rank in ranks]
        exact = case.options.get("precision", "fp32") == "fp32"
        for rank in found:
            lengths = [len(answer) for answer in rank["answers"]]
            assert rank["seen"] == sum(lengths), (
                "each token of an answer is sampled once, and nothing after its end"
            )
            assert rank["logits_differ"] <= (1e-4 if exact else 2e-2 * rank["logits_size"]), (
                case.name
            )
            generated = [value for row in rank["logprobs"] for value in row]
            tolerance = {"rtol": 0, "atol": 1e-4} if exact else {"rtol": 2e-2, "atol": 2e-2}
            assert_close(
                generated, rank["update_logprobs"], **tolerance, msg=f"{case.name}: {generated}"
            )
            if exact:
                expected = plain(case.family, case.tied, case.vocab_size)
                assert rank["answers"] == [expected[row] for row in rank["rows"]], case.name
        check_feeding(case, found)


def check_feeding(case: Case, found: list[dict]) -> None:
    """Prompts once, then one token at a time; ranks leave together only where they must."""
    last = [max(map(len, rank["answers"])) for rank in found]
    steps = [len(rank["widths"]) for rank in found]
    for rank in found:
        assert rank["widths"][1:] == [1] * (len(rank["widths"]) - 1)
        mine = [PROMPTS[row] for row in rank["rows"]]
        real = sum(map(len, dict.fromkeys(map(tuple, mine))))  # equal prompts together
        assert rank["widths"][0] in (max(map(len, mine)), real)
    if case.options["plugin"] == "gemini":
        assert steps == [max(last)] * len(found)
    else:
        assert steps == last
    if case.options.get("tp", 1) > 1:
        assert (
            found[0]["answers"] == found[1]["answers"]
            and found[0]["logprobs"] == found[1]["logprobs"]
        )
    elif case.name == "plain":
        assert len(set(last)) > 1, "the rows of the ranks are to end at different times"


class WithHead(torch.nn.Module):
    def get_output_embeddings(self):
        return self


def engine(boosted=None, pp_size=1, module=None, **options):
    """``boosted``: the sharding that a plugin was given by hand."""
    plugin, mesh = SimpleNamespace(shard_config=boosted), SimpleNamespace(pp_size=pp_size)
    return SimpleNamespace(
        mesh=mesh, options=ParallelOptions(**options), plugin=plugin, module=module or WithHead()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugin": "3d", "pp": 2}, "--pp 2"),
        ({"pp_size": 2}, "--pp 2"),
        ({"enable_sequence_parallelism": True}, "--enable_sequence_parallelism, --sp"),
        (
            {"boosted": SimpleNamespace(enable_sequence_parallelism=True)},
            "--enable_sequence_parallelism, --sp",
        ),
        ({"plugin": "3d", "tp": 2, "use_flash_attn": True}, "--use_flash_attn with --plugin 3d"),
        ({"plugin": "gemini", "use_flash_attn": True}, "--use_flash_attn with --plugin gemini"),
        ({"module": torch.nn.Linear(1, 1)}, "Linear has no vocabulary head"),
    ],
)
def test_what_cannot_sample_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(
            engine(**changes),
            None,
            None,
            sampling=None,
            stop_sequences=[],
            max_new_tokens=1,
            pad_token_id=0,
        )


@pytest.mark.parametrize("options", [{}, {"use_flash_attn": True}, {"plugin": "3d", "tp": 2}])
def test_what_can_sample(options):
    assert cannot_sample(engine(**options)) is None
