"""``coati fit``: settings that fit, the flags to paste, and what it says where nothing fits."""

import shlex
from pathlib import Path

import pytest

from coati.cli.arguments import parse_sft
from coati.cli.distilling import parse_gkd
from coati.cli.fit import parse_fit
from coati.cli.offline_rl import parse_ilql
from coati.cli.preferences import parse_dpo, parse_kto, parse_orpo, parse_rm
from coati.cli.pretraining import parse_pretrain
from coati.cli.rollout_pairs import parse_online_dpo
from coati.cli.rollouts import parse_grpo, parse_ppo
from coati.parallel.footprint.fitting import (
    BATCHES,
    COLUMNS,
    METHODS,
    RESERVED,
    at_batch,
    candidates,
    memory_table,
    settings_that_fit,
)
from coati.parallel.footprint.model_shape import built_in, load_shape
from coati.recipes.verbs.fit import main, markdown
from coati.utils.transformers_compat import transformers_major

PARSERS = {
    "pretrain": parse_pretrain,
    "sft": parse_sft,
    "lora": parse_sft,
    "rm": parse_rm,
    "dpo": parse_dpo,
    "orpo": parse_orpo,
    "kto": parse_kto,
    "gkd": parse_gkd,
    "ilql": parse_ilql,
    "ppo": parse_ppo,
    "grpo": parse_grpo,
    "online_dpo": parse_online_dpo,
}
ROWS = str(Path(__file__).parents[3] / "examples" / "data" / "sft.jsonl")
GB = 10**9


def shown(capsys, *words: str) -> str:
    main(parse_fit(list(words)))
    return capsys.readouterr().out


def test_24_gb_train_adapters_of_8b(capsys):
    text = shown(capsys, "--model", "Qwen3-8B", "--memory", "24GB")
    assert "Qwen3-8B: 8,190,735,360 parameters, sft, rows of 2048 tokens" in text
    (row,) = [line for line in text.splitlines() if line.startswith("LoRA 16")]
    assert [cell.strip() for cell in row.split("|")][1:5] == ["zero2", "bf16", "yes", "4"]
    assert text.splitlines()[-1].startswith("coati sft --pretrain Qwen/Qwen3-8B --dataset DATA ")


def test_the_largest_batch_is_the_last_that_fits():
    shape = load_shape("SmolLM2-135M")
    found = settings_that_fit(shape, "sft", 12 * GB)
    assert found
    for fit in found:
        assert fit.peak <= 12 * GB
        larger = [size for size in BATCHES if size > fit.plan.batch_size][:1]
        assert all(at_batch(shape, fit.plan, size).peak > 12 * GB for size in larger)


def test_the_best_comes_first():
    found = settings_that_fit(load_shape("Qwen3-4B"), "dpo", 80 * GB, gpus=4)
    host = [fit.plan.plugin.host_optimizer for fit in found]
    assert host == sorted(host)
    whole = [bool(fit.plan.lora_rank) for fit in found if not fit.plan.plugin.host_optimizer]
    assert whole == sorted(whole) and not whole[0] and whole[-1]
    splits = {(fit.plan.options.plugin, fit.plan.options.tp) for fit in found}
    assert {("zero2", 1), ("gemini", 1), ("3d", 4)} <= splits
    assert all(not fit.plan.lora_rank for fit in found if fit.plan.options.plugin == "gemini")


def test_host_memory_is_used_where_nothing_else_fits():
    found = settings_that_fit(load_shape("SmolLM2-1.7B"), "sft", 24 * GB)
    offloaded = [fit for fit in found if fit.plan.plugin.host_optimizer]
    assert offloaded and all(not fit.plan.lora_rank for fit in offloaded)
    assert offloaded[0].estimate.host == 12 * 1_711_376_384
    enough = settings_that_fit(load_shape("SmolLM2-1.7B"), "sft", 80 * GB)
    assert not any(fit.plan.plugin.host_optimizer for fit in enough)


def test_heads_limit_tensor_parallelism():
    odd = settings_that_fit(load_shape("SmolLM2-135M"), "sft", 80 * GB, gpus=2)  # 9 heads of 3
    assert odd and all(fit.plan.options.tp == 1 for fit in odd)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_the_flags_are_those_of_the_command(capsys, method, gpus):
    words = ["--model", "Qwen3-0.6B", "--memory", "80GB", "--method", method, "--gpus", str(gpus)]
    *_, line = shown(capsys, *words).splitlines()
    verb, *flags = shlex.split(line)[1:]
    assert verb == ("sft" if method == "lora" else method.replace("_", "-"))
    flags = [ROWS if flag == "DATA" else flag for flag in flags]
    flags = [str(Path(ROWS).parent) if flag == "REWARD_MODEL" else flag for flag in flags]
    flags = ["some/teacher" if flag == "TEACHER" else flag for flag in flags]
    flags = ["length" if flag == "FUNCTION" else flag for flag in flags]
    if gpus > 1:
        assert flags[-2:] == ["--nproc", "2"]  # the command's own, not a script's
        flags = flags[:-2]
    settings = PARSERS[method]([*flags, "--save_dir", "out"])
    assert settings.data.max_length == 2048 and settings.parallel.precision == "bf16"
    assert bool(settings.lora.lora_rank) == (method == "lora")


def test_nothing_fits(capsys):
    words = ["--model", "Llama-3.1-8B", "--memory", "2GB", "--method", "ppo"]
    with pytest.raises(ValueError) as error:
        main(parse_fit(words))
    text = str(error.value)
    assert "--memory 1.86 GiB: ppo of Llama-3.1-8B does not fit; the least is 4" in text
    assert "--offload_inference_models" in text and "Take a smaller model" in text
    with pytest.raises(ValueError, match=r"It fits with --max_length \d+\."):
        main(parse_fit(["--model", "gpt-oss-20b", "--memory", "48GB", "--max_length", "8192"]))
    # Adapters of layers that are split need transformers 5.
    new = transformers_major() >= 5
    helps = r"It fits with --gpus 2\." if new else r"It fits with --quantize_base nf4\."
    with pytest.raises(ValueError, match=helps):
        main(parse_fit(["--model", "Qwen3-8B", "--memory", "16GiB"]))


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="Llama-9: expected a directory with config.json or one"):
        main(parse_fit(["--model", "Llama-9", "--memory", "24GB"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "24GB"], "--model is required"),
        (["--model", "Qwen3-8B"], "--memory is required"),
        (["--model", "Qwen3-8B", "--memory", "lots"], "an amount of memory like 24GB or 80GiB"),
        (["--model", "Qwen3-8B", "--memory", "0GB"], "found '0GB'"),
        (["--model", "Qwen3-8B", "--memory", "24GB", "--method", "sfft"], "invalid choice: 'sfft'"),
    ],
)
def test_wrong_flags_are_refused(capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        parse_fit(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "bytes_of"),
    [("24", 24e9), ("24GB", 24e9), ("1.5 GiB", 1.5 * 2**30), ("512mb", 512e6)],
)
def test_amounts(text, bytes_of):
    assert parse_fit(["--model", "M", "--memory", text]).memory == bytes_of


def test_the_table_has_every_model_and_method():
    header, *rows = memory_table()
    assert header[2:] == [title for title, _, _ in COLUMNS]
    assert [row[0] for row in rows] == [
        name.split("/")[1]
        for name in sorted(set(built_in().values()), key=lambda name: load_shape(name).parameters())
    ]
    by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    # 16 bytes a weight, 4 for the fp32 copies of gradients: what every layer keeps comes on top
    least = (20 * 8.19e9 + RESERVED) / 2**30
    assert least < float(by_name["Qwen3-8B"]["SFT"]) < 1.1 * least
    for row in by_name.values():
        assert float(row["SFT, LoRA"]) < float(row["SFT"]) < float(row["PPO"])
    lines = markdown([header, *rows]).splitlines()
    assert lines[1].count("---") == len(header) and lines[-1].startswith("| gpt-oss-20b | 21B | ")


def test_shorter_rows_take_less():
    long, short = (dict((row[0], row) for row in memory_table(length)) for length in (4096, 512))
    for name in ("Qwen3-8B", "gpt-oss-20b"):
        assert float(short[name][3]) < float(long[name][3])


def test_an_optimizer_and_offloaded_inputs_leave_room_for_more(capsys):
    words = ("--model", "Qwen3-4B", "--memory", "80GB")
    shape = load_shape("Qwen3-4B")
    (plain, *_) = [plan for plan in candidates("sft", 1, 2048, 16) if plan.options.grad_checkpoint]
    (away, *_) = [
        plan
        for plan in candidates("sft", 1, 2048, 16, optim="adamw8bit", offload_activations=True)
        if plan.options.grad_checkpoint
    ]
    assert at_batch(shape, away, 8).peak < 0.8 * at_batch(shape, plain, 8).peak
    assert at_batch(shape, away, 8).estimate.host > 0 == at_batch(shape, plain, 8).estimate.host
    text = shown(capsys, *words, "--optim", "adamw8bit", "--offload_activations")
    words = shlex.split(text.splitlines()[-1].replace("DATA", ROWS))
    settings = parse_sft(words[2:])
    assert settings.optimizer.optim == "adamw8bit"
    assert settings.parallel.offload_activations == settings.parallel.grad_checkpoint


def test_a_budget_of_tokens_is_what_the_command_gets(capsys):
    words = ("--model", "Qwen3-0.6B", "--memory", "24GB", "--tokens_per_batch", "4096")
    text = shown(capsys, *words)
    assert "--tokens_per_batch 4096" in text.splitlines()[-1]
    settings = parse_sft(shlex.split(text.splitlines()[-1].replace("DATA", ROWS))[2:])
    assert settings.parallel.tokens_per_batch == 4096
    # However many rows a step has, no micro-batch has more than two of 2048.
    (plan, *_) = candidates("sft", 1, 2048, 16, tokens_per_batch=4096)
    peaks = [at_batch(load_shape("Qwen3-0.6B"), plan, size).peak for size in (2, 64)]
    assert peaks[0] == peaks[1]


def test_what_needs_whole_matrices_is_not_offered_shards(capsys):
    text = shown(capsys, "--model", "Qwen3-0.6B", "--memory", "24GB", "--optim", "muon")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.count("|") == 6][1:]
    assert rows and set(rows) == {"3d"}
    assert "--plugin 3d --mixed_precision bf16 --optim muon" in text
