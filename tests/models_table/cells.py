"""The cells of docs/models.md: what is tried with a tiny model of a family under a column, in the
processes of one group."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coati.parallel.objective import Objective
from coati.parallel.plugins import ParallelOptions
from tests.models_table.families import VOCABULARY, Family, tiny_config, tiny_model

ROWS = 8
STEPS = 2
NEW_TOKENS = 8
_SEQUENCE = {"plugin": "3d", "enable_sequence_parallelism": True}
_BF16 = {"precision": "bf16"}


@dataclass(frozen=True)
class Column:
    """``trial``: a function of this module; ``processes``: how many it runs in."""

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    trial: str = "train"
    processes: int = 2

    @property
    def tolerance(self) -> float:
        """Of losses and gradient norms, relative to one process in the same precision."""
        return 1e-5 if self.options.get("precision", "fp32") == "fp32" else 2e-2

    @property
    def reference(self) -> str:
        """Title of the column of one process that this one is compared with."""
        if self.options.get("precision") == "bf16":
            return ALONE_BF16.title
        return ALONE_LORA.title if self.lora else ALONE.title


ALONE = Column("one process", {"plugin": "ddp"}, processes=1)
ALONE_LORA = Column("one process with LoRA", {"plugin": "ddp"}, lora=True, processes=1)
ALONE_BF16 = Column("one process in bf16", {"plugin": "zero2"} | _BF16, processes=1)
COLUMNS = (
    Column("ddp", {"plugin": "ddp"}),
    Column("zero2", {"plugin": "zero2"}),
    Column("zero2 with LoRA", {"plugin": "zero2"}, lora=True),
    Column("zero2_cpu", {"plugin": "zero2_cpu"}),
    Column("gemini", {"plugin": "gemini"} | _BF16),
    Column("gemini_auto", {"plugin": "gemini_auto"} | _BF16),
    Column("gemini --tp 2", {"plugin": "gemini", "tp": 2} | _BF16),
    Column("3d", {"plugin": "3d"}),
    Column("3d --tp 2", {"plugin": "3d", "tp": 2}),
    Column("3d --pp 2", {"plugin": "3d", "pp": 2, "microbatch_size": 2}),
    Column(
        "3d --tp 2 --pp 2",
        {"plugin": "3d", "tp": 2, "pp": 2, "microbatch_size": 2},
        processes=4,
    ),
    Column("3d split_gather", _SEQUENCE | {"tp": 2, "sp_mode": "split_gather"}),
    Column("3d ring", _SEQUENCE | {"tp": 2, "sp_mode": "ring"}),
    Column("3d all_to_all", _SEQUENCE | {"sp": 2, "sp_mode": "all_to_all"}),
    Column("3d --tp 2 with LoRA", {"plugin": "3d", "tp": 2}, lora=True),
    Column("sampling", {"plugin": "ddp"}, trial="sample", processes=1),
    Column("sampling --tp 2", {"plugin": "3d", "tp": 2}, trial="sample"),
    Column("saving", {"plugin": "3d", "tp": 2}, trial="save"),
    Column("packing", {"plugin": "ddp", "packing": True}, trial="pack", processes=1),
)
BY_TITLE = {column.title: column for column in (ALONE, ALONE_LORA, ALONE_BF16, *COLUMNS)}


class _CrossEntropy(Objective):
    def loss(self, logps, batch):
        return -logps.sum(), {}


def rows(step: int, pad: int) -> dict[str, torch.Tensor]:
    """A batch of ROWS rows of 5 to 16 (first step) or 24 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(step)
    length = (16, 24)[step]
    tokens = torch.randint(3, VOCABULARY, (ROWS, length), generator=generator)
    lengths = torch.randint(5, length + 1, (ROWS,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    labels = tokens.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return {
        "input_ids": tokens.masked_fill(~mask, pad),
        "attention_mask": mask.long(),
        "labels": labels,
    }


def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of ``batch``, two by two in one sequence."""
    kept = batch["attention_mask"].bool()
    lines = []
    for first in range(0, ROWS, 2):
        parts = {
            key: torch.cat([batch[key][row][kept[row]] for row in (first, first + 1)])
            for key in ("input_ids", "labels")
        }
        positions = [torch.arange(int(kept[row].sum())) for row in (first, first + 1)]
        lines.append(parts | {"position_ids": torch.cat(positions)})
    width = max(len(line["input_ids"]) for line in lines)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0, "attention_mask": 0}
    made = {}
    for key, value in fill.items():
        padded = [
            torch.nn.functional.pad(
                line.get(key, torch.ones_like(line["input_ids"])),
                (0, width - len(line["input_ids"])),
                value=value,
            )
            for line in lines
        ]
        made[key] = torch.stack(padded)
    return made


def boosted(family: Family, column: Column):
    """An engine of the family's tiny model under ``column``; raises ValueError where the library
    refuses it."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import set_seed

    set_seed(0)
    model = tiny_model(family)
    if column.lora:
        from coati.models.lora.lora import LoraConfig, apply_lora

        model = apply_lora(model, LoraConfig(r=4, linear_lora_dropout=0.0))
        _move_adapters(model)
    options = ParallelOptions(grad_clip=0.5, batch_size=ROWS, lora=column.lora, **column.options)
    # Adam's first steps are as long for a gradient of rounding errors as for a large one.
    return boost(model, options, lr=1e-4, total_steps=4, warmup_steps=0)


def _move_adapters(model: torch.nn.Module) -> None:
    """Adapters start with B = 0, where a wrong A would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def train(family: Family, column: Column) -> list[list[float]]:
    """[loss, gradient norm] of two steps."""
    return _train(family, column, lambda batch: batch)


def pack(family: Family, column: Column) -> list[list[float]]:
    """As :func:`train`, two rows to a sequence."""
    return _train(family, column, packed)


def _train(family: Family, column: Column, change: Callable) -> list[list[float]]:
    engine = boosted(family, column)
    pad = getattr(engine.module.config, "pad_token_id", None) or 0
    share = engine.mesh.dp_rank
    count = engine.mesh.dp_size
    steps = []
    for step in range(STEPS):
        whole = change(rows(step, pad))
        batch = {key: value.chunk(count)[share] for key, value in whole.items()}
        done = engine.train_step([batch], _CrossEntropy())
        steps.append([done.loss, done.grad_norm])
    return steps


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """(4, 12) ids and mask, padded on the left; the first prompt twice."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=generator)
    lengths = torch.tensor([12, 7, 9, 12])
    ids[3] = ids[0]
    mask = (torch.arange(12) >= 12 - lengths[:, None]).long()
    return ids * mask, mask


def sample(family: Family, column: Column) -> list[list[int]]:
    """Greedy responses of the library, which must be those of transformers' ``generate`` for each
    prompt alone. Rows end at different times: the second token of each row's response is the stop
    sequence of the batch's third row."""
    from coati.models.generation.sampling import Sampling
    from coati.parallel.sharded_generation import sample as sample_rows

    ids, mask = prompts()
    plain = tiny_model(family).eval()
    expected = []
    with torch.no_grad():
        for row, real in zip(ids, mask, strict=True):
            alone = row[real.bool()][None]
            made = plain.generate(
                alone,
                attention_mask=torch.ones_like(alone),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )
            expected.append(made[0, alone.shape[1] :].tolist())
    stop = expected[1][2]  # the second row ends early
    expected = [line[: line.index(stop) + 1] if stop in line else line for line in expected]
    engine = boosted(family, column)
    engine.module.eval()
    made = sample_rows(
        engine,
        ids,
        mask,
        sampling=Sampling(do_sample=False),
        stop_sequences=[[stop]],
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    ).responses()
    assert made == expected, f"{made} instead of {expected}"
    return made


def save(family: Family, column: Column) -> str:
    """Saved after a step, the model has the names that ``save_pretrained`` writes, and plain
    transformers' logits of it are those of the model here."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from coati.parallel.weights import ModelAssets, save_model

    plain = tiny_model(family)
    assets = ModelAssets.of(plain)
    engine = boosted(family, column)
    batch = rows(0, getattr(engine.module.config, "pad_token_id", None) or 0)
    share = {
        key: value.chunk(engine.mesh.dp_size)[engine.mesh.dp_rank] for key, value in batch.items()
    }
    engine.train_step([share], _CrossEntropy())
    place: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place)
    folder = Path(place[0])
    save_model(engine, folder / "ours", assets)
    dist.barrier()
    if dist.get_rank() == 0:
        plain.save_pretrained(folder / "theirs")
        assert names_in(folder / "ours") == names_in(folder / "theirs")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder / "ours",
        output_loading_info=True,
        attn_implementation=plain.config._attn_implementation,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    engine.module.eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = loaded.eval()(**inputs).logits
        ours = engine.module(**inputs).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[..., :VOCABULARY][real], theirs[real], rtol=1e-4, atol=1e-5)
    dist.barrier()
    return "saved"


def names_in(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a directory."""
    from safetensors import safe_open

    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            found |= {name: held.get_slice(name).get_shape() for name in held.keys()}
    return found


def refusal(family: Family, column: Column) -> str | None:
    """What the library says of this cell before a model is built, or None."""
    from coati.parallel.families import check_family
    from coati.parallel.plugin_checks import check_heads, check_options

    if family.config is None or family.type == "chatglm":
        config = type("Config", (), {"model_type": family.type, **(family.config or {})})()
    else:
        config = tiny_config(family)
    options = ParallelOptions(batch_size=ROWS, lora=column.lora, **column.options)
    try:
        check_options(world_size=column.processes, **vars(options))
        check_heads(config, options)
        check_family(config, options)
    except ValueError as error:
        return str(error)
    return None
