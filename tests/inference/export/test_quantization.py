"""Fewer bits a weight: what is written is smaller, loads again with the same answers, and what
cannot be is refused."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coati.cli.inference import parse_inference
from coati.cli.quantize import parse_benchmark, parse_quantize
from coati.cli.serve import parse_server
from coati.inference.export.measures import Size, perplexity, read_conversations, size_of, speed_of
from coati.inference.export.quantization import check_groups, outlier_layers, quantize
from coati.inference.model_loading import load
from coati.inference.quantized_loading import quantization_kwargs, require_package
from coati.legacy.flags import QUANTIZED
from tests.inference.export.test_model_dir import adapter, verb
from tests.inference.test_model_loading import write
from tests.tiny import tiny_llama

IDS = torch.tensor([[5, 17, 300, 42, 8, 9]])
HAS = {
    name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "llmcompressor")
}


def calibration(rows=6):
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randint(3, 380, (40,), generator=drawn).tolist(), []) for _ in range(rows)]


def data(tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": turns}) + "\n" for _ in range(3))
    )
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("method", ["8bit", "nf4", "rtn", "gptq"])
def test_a_quantized_directory_is_smaller_and_answers_nearly_alike(tmp_path, method):
    if not HAS["llmcompressor" if method in ("rtn", "gptq") else "bitsandbytes"]:
        pytest.skip("its package is not installed")
    original = write(tmp_path / "model").eval()
    quantize(tmp_path / "model", tmp_path / "out", method, calibration=calibration(), group_size=64)
    loaded = load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        found, wanted = loaded.model(IDS).logits.float(), original(IDS).logits
    assert 0 < (found - wanted).norm() < 0.35 * wanted.norm()
    assert size_of(tmp_path / "out").ratio(size_of(tmp_path / "model")) < (
        0.75 if method == "8bit" else 0.5
    )
    assert loaded.conversation.stop_ids == [[2]]
    if (
        method == "nf4"
    ):  # --quant does the same while loading; what keeps its precision is bf16 in the directory
        with torch.no_grad():
            same = load(tmp_path / "model", quant="4bit", device="cpu").model(IDS).logits
        assert (same - found).norm() < 0.01 * found.norm()
    with pytest.raises(ValueError, match="is quantized already"):
        load(tmp_path / "out", quant="8bit")


def kept(model):
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def mlp(layer):
    return {f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")}


@pytest.mark.skipif(not HAS["bitsandbytes"], reason="bitsandbytes is not installed")
@pytest.mark.parametrize("grouped", [True, False])
def test_with_4_bits_values_shared_keys_and_the_last_mlps_keep_their_precision(tmp_path, grouped):
    write(tmp_path)  # the tokenizer
    model = tiny_llama(layers=15)
    if not grouped:
        model = LlamaForCausalLM(
            LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": 4})
        )
    model.save_pretrained(tmp_path)
    names = {"k_proj", "v_proj"} if grouped else {"v_proj"}
    attention = {f"model.layers.{layer}.self_attn.{name}" for layer in range(15) for name in names}
    assert kept(load(tmp_path, quant="4bit", device="cpu").model) == attention | mlp(14) | {
        "lm_head"
    }


@pytest.mark.skipif(not HAS["bitsandbytes"], reason="bitsandbytes is not installed")
def test_a_directory_of_4_bits_keeps_the_layers_with_outlier_outputs(tmp_path):
    write(tmp_path / "model")  # the tokenizer
    model = tiny_llama(layers=12)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[7, 9] = 500
    model.save_pretrained(tmp_path / "model")
    assert outlier_layers(tmp_path / "model") == ["model.layers.4.mlp.down_proj"]
    quantize(tmp_path / "model", tmp_path / "out", "nf4")
    found = kept(load(tmp_path / "out", device="cpu").model)
    plain = kept(load(tmp_path / "model", quant="4bit", device="cpu").model)
    assert found - plain == {"model.layers.4.mlp.down_proj"}
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", "nf4")


def test_models_of_few_layers_have_no_outlier_layers_to_look_for(tmp_path):
    write(tmp_path)
    assert outlier_layers(tmp_path) == []


def test_perplexity_is_that_of_the_supervised_tokens(tmp_path, capfd):
    model = tiny_llama(layers=1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    rows = [([5, 6, 7], [-100, -100, 7]), ([1, 2], [-100, -100])]
    assert perplexity(model, rows) == pytest.approx(384)  # every token is as likely
    with pytest.raises(ValueError, match="no token of these rows is supervised"):
        perplexity(model, rows[1:])
    write(tmp_path)
    found = read_conversations(
        [data(tmp_path)], load(tmp_path, device="cpu").conversation, 64, limit=2
    )
    assert len(found) == 2 and sum(label != -100 for label in found[0][1]) >= 2
    assert math.isfinite(perplexity(tiny_llama(layers=1), found))
    assert "left out" not in capfd.readouterr().err
    conversation = load(tmp_path, device="cpu").conversation
    rows = Path(data(tmp_path))
    long = {"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}
    rows.write_text(rows.read_text() + json.dumps({"messages": long}) + "\n")
    count = len(read_conversations([rows], conversation, 64))
    said = capfd.readouterr().err
    assert f"1 of {count + 1} conversations are left out, the first: {rows}:" in said
    assert "too_long" in said


def test_sizes_count_embeddings_apart(tmp_path):
    model = write(tmp_path)
    table = 384 * 64 * 4
    rest = 4 * sum(p.numel() for p in model.parameters()) - 2 * table
    assert size_of(tmp_path) == Size(2 * table, rest, rest // 4)
    assert size_of(tmp_path).ratio(size_of(tmp_path)) == 2  # fp32 beside bf16
    with pytest.raises(ValueError, match="no .*safetensors"):
        size_of(tmp_path / "nothing")


def test_speed_counts_every_response_of_the_batch(tmp_path):
    write(tmp_path)
    speed = speed_of(load(tmp_path, device="cpu"), 3, prompt_tokens=4, new_tokens=5)
    assert speed.batch == 3 and speed.first_token_seconds > 0 and speed.tokens_per_second > 0


@pytest.mark.parametrize(
    ("size", "message"), [(48, "does not divide the 64 inputs of .*: 16, 32, 64$"), (64, None)]
)
def test_group_sizes_divide_every_layer(size, message):
    if message is None:
        check_groups(tiny_llama(layers=1), size)
        return
    with pytest.raises(ValueError, match=message):
        check_groups(tiny_llama(layers=1), size)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gptq needs calibration data"):
        quantize(tmp_path, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match="method must be one of 8bit, nf4, gptq, rtn"):
        quantize(tmp_path, tmp_path / "out", "int3")
    adapter(tmp_path)
    with pytest.raises(ValueError, match="is a LoRA adapter.*coati merge"):
        quantize(tmp_path / "adapter", tmp_path / "out", "8bit")
    with pytest.raises(ValueError, match="is a LoRA adapter.*coati merge"):
        load(tmp_path / "adapter", quant="8bit")
    with pytest.raises(ValueError, match="wanted needs the package no-such-package"):
        require_package("no_such_package", "wanted")
    assert quantization_kwargs(tmp_path / "base", None, torch.device("cpu"), "fp32") is None
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not HAS["bitsandbytes"], reason="bitsandbytes is not installed")
def test_the_script_prints_a_line_for_the_original_and_each_method(tmp_path, capsys):
    write(tmp_path / "model")
    words = [
        "--model_path",
        str(tmp_path / "model"),
        "--output_dir",
        str(tmp_path / "q"),
        "--eval",
        data(tmp_path),
    ]
    words += ["--method", "nf4", "--new_tokens", "3", "--output", str(tmp_path / "figures.json")]
    verb("quantize").main(parse_quantize(words))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "original", "nf4"]
    original, nf4 = json.loads((tmp_path / "figures.json").read_text())
    assert nf4["bytes"] < original["bytes"] and nf4["ratio"] < 0.5 and original["perplexity"] > 1


def test_the_benchmark_measures_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    write(tmp_path)
    module = verb("measure")
    words = [
        "--model_path",
        str(tmp_path),
        "--quant",
        "full",
        "--batch_size",
        "1",
        "2",
        "--new_tokens",
        "2",
    ]
    args = parse_benchmark([*words, "--prompt_tokens", "3", "--output", str(tmp_path / "b.json")])
    received = []

    class Pipe:
        def send(self, found):
            received.append(found)

    module.measure(args, "full", Pipe())
    monkeypatch.setattr(module, "in_a_process", lambda args, quant: received[0])
    module.main(args)
    assert "tokens/s x2" in capsys.readouterr().out
    assert received[0]["peak_memory_mb"] > 0 and set(received[0]["tokens_per_second"]) == {1, 2}
    module.measure(parse_benchmark(["--model_path", str(tmp_path / "gone")]), "full", Pipe())
    assert "no such directory" in received[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output_dir o --method nf4 --eval e", "--model_path is required"),
        ("--model_path m --output_dir o --eval e", "--method is required: one or more of 8bit"),
        ("--model_path m --output_dir o --method nf4", "--eval is required"),
        (
            "--model_path m --output_dir o --method gptq --eval e",
            "--method gptq needs --calibration FILE",
        ),
    ],
)
def test_bad_flags_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_quantize(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_benchmark(["--model_path", "m", "--batch_size", "0"])


@pytest.mark.parametrize("parse", [parse_inference, parse_server, parse_benchmark])
@pytest.mark.parametrize(
    ("flag", "answer"),
    [("--gptq_checkpoint", "quantize.py --method gptq"), ("--gptq_group_size", "--group_size")],
)
def test_flags_of_gptq_files_are_answered(parse, flag, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--model_path", "x", flag, "128"], older=QUANTIZED)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and flag in said and answer in said
