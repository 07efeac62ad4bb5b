"""Inputs that are damaged, of another kind, or impossible, for every verb that reads any: no
traceback, no exit code of 0, and one message that names the flag or the file and what to do.

Each runs as the command does, in this process; some once more as a process of their own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coati.recipes import command
from coati.utils.logging import forget_warnings
from coati.utils.transformers_compat import masks_packs_itself
from tests.end_to_end import malformed as bad
from tests.end_to_end.malformed import ROW, Case, Place, ended, good_words
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = "tokenizer.json"
FIELDS = "tokenizer_config.json"
# transformers 5 refuses such a configuration, transformers 4 the weights.
NOT_DIVIDED = "model could not be loaded" if masks_packs_itself() else "have other shapes"
ENDLESS = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
STATE = "running_states.json"


def link_to_itself(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.symlink("model.safetensors", folder / "model.safetensors")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def swapped(tokenizer: dict) -> dict:
    """Two tokens with the ids of each other."""
    vocabulary = dict(tokenizer["model"]["vocab"])
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return tokenizer | {"model": tokenizer["model"] | {"vocab": vocabulary}}


def a_part_less(folder: Path) -> None:
    shutil.rmtree(sorted(folder.glob("part-*"))[-1])


def fifo(place: Place) -> str:
    os.mkfifo(place.folder / "rows.jsonl")
    return str(place.folder / "rows.jsonl")


def no_shards(weights: dict) -> dict:
    return {name: tensor for name, tensor in weights.items() if "layers.1" not in name}


def narrow(weights: dict) -> dict:
    return {k: v[:5].clone() if "q_proj" in k else v for k, v in weights.items()}


CASES = {
    # Tokenizers
    "tokenizer cut": Case(
        "sft",
        (TOKENIZER, "not valid JSON", "copy it"),
        lambda p: p.copy(p.model, bad.cut(TOKENIZER, 300)),
    ),
    "tokenizer a list": Case(
        "dpo", (TOKENIZER, "JSON object", "found list"), bad.with_file(TOKENIZER, "[]")
    ),
    "tokenizer null": Case("rm", (TOKENIZER, "null"), bad.with_file(TOKENIZER, "null")),
    "tokenizer bytes": Case(
        "prepare", (TOKENIZER, "not UTF-8"), bad.with_file(TOKENIZER, b"\xff\xfe\0")
    ),
    "tokenizer without its model": Case(
        "chat",
        ("--model_path", "tokenizer could not be loaded", "copy its files"),
        bad.tokenizer_json(lambda t: {k: v for k, v in t.items() if k != "model"}),
    ),
    "tokenizer of an unknown model": Case(
        "grpo",
        ("tokenizer could not be loaded", "copy its files"),
        bad.tokenizer_json(lambda t: t | {"model": {"type": "Nope"}}),
    ),
    "vocabulary a list": Case(
        "ppo",
        ("tokenizer could not be loaded",),
        bad.tokenizer_json(lambda t: t | {"model": t["model"] | {"vocab": [1]}}),
    ),
    "tokenizer settings a list": Case("kto", (FIELDS, "found list"), bad.with_file(FIELDS, "[]")),
    "tokenizer settings a text": Case("orpo", (FIELDS, "found str"), bad.with_file(FIELDS, '"a"')),
    "tokenizer settings cut": Case(
        "serve", (FIELDS, "not valid JSON"), bad.with_file(FIELDS, '{"eos_token": ')
    ),
    "tokenizer class a number": Case(
        "export", (FIELDS, "tokenizer_class is 7"), bad.with_file(FIELDS, '{"tokenizer_class": 7}')
    ),
    "longest text a word": Case(
        "prepare",
        (FIELDS, "model_max_length is 'many'"),
        bad.with_file(FIELDS, '{"eos_token": "<|im_end|>", "model_max_length": "many"}'),
    ),
    "end token a number": Case(
        "compare", ("eos_token",), bad.with_file(FIELDS, '{"eos_token": 5}')
    ),
    "special tokens a list": Case(
        "quantize",
        ("special_tokens_map.json", "found list"),
        bad.with_file("special_tokens_map.json", "[]"),
    ),
    # Configurations
    "no configuration in it": Case(
        "sft", ("config.json", "not valid JSON"), bad.with_file("config.json", "")
    ),
    "configuration a list": Case(
        "fit", ("config.json", "found list"), bad.with_file("config.json", "[]")
    ),
    "configuration bytes": Case(
        "grpo", ("config.json", "not UTF-8"), bad.with_file("config.json", b"\xff\xfe\0")
    ),
    "configuration nested": Case(
        "chat", ("config.json", "nested too deeply"), bad.with_file("config.json", "[" * 100_000)
    ),
    "no layers": Case(
        "sft", ("num_hidden_layers is 0", "at least 1"), bad.with_config(num_hidden_layers=0)
    ),
    "no layers to fit": Case(
        "fit", ("num_hidden_layers is 0",), bad.with_config(num_hidden_layers=0)
    ),
    "layers below 0": Case(
        "rm", ("num_hidden_layers is -1",), bad.with_config(num_hidden_layers=-1)
    ),
    "half a layer": Case(
        "ppo", ("num_hidden_layers is 2.5",), bad.with_config(num_hidden_layers=2.5)
    ),
    "no vocabulary": Case("dpo", ("vocab_size is 0",), bad.with_config(vocab_size=0)),
    "width a text": Case("kto", ("hidden_size is '64'",), bad.with_config(hidden_size="64")),
    "width nothing": Case("sft", ("hidden_size",), bad.with_config(hidden_size=None)),
    "no heads": Case(
        "export", ("num_attention_heads is 0",), bad.with_config(num_attention_heads=0)
    ),
    "no positions": Case(
        "chat", ("max_position_embeddings is 0",), bad.with_config(max_position_embeddings=0)
    ),
    "heads that do not divide": Case(
        "sft", (NOT_DIVIDED,), bad.with_config(num_attention_heads=3, head_dim=None)
    ),
    "heads of keys that the weights lack": Case(
        "orpo",
        ("weights have other shapes", "k_proj", "config.json"),
        bad.with_config(num_key_value_heads=4),
    ),
    "a narrower model": Case(
        "chat",
        ("21 weights have other shapes", "put back the config.json"),
        bad.with_config(hidden_size=32, head_dim=8, intermediate_size=64),
    ),
    "fewer layers than weights": Case(
        "sft",
        ("weights are of layers that the model does not have", "num_hidden_layers 1"),
        bad.with_config(num_hidden_layers=1),
    ),
    "more layers than weights": Case(
        "grpo", ("are not in the files", "incomplete copy"), bad.with_config(num_hidden_layers=4)
    ),
    "an unknown family": Case(
        "serve", ("model family 'nope'", "config.json"), bad.with_config(model_type="nope")
    ),
    "an unknown family to sample from": Case(
        "rollout-server",
        ("model family 'nope'", "config.json"),
        bad.with_config(model_type="nope"),
    ),
    "a reward model to sample from": Case(
        "rollout-server", ("lm_head.weight", "another kind"), lambda place: str(place.reward_model)
    ),
    "family a list": Case(
        "rm", ("model_type is ['llama']",), bad.with_config(model_type=["llama"])
    ),
    "an encoder and decoder": Case(
        "chat", ("could not be loaded",), bad.with_config(model_type="t5")
    ),
    "end token a word": Case("dpo", ("eos_token_id is 'x'",), bad.with_config(eos_token_id="x")),
    "an unknown activation": Case(
        "sft", ("could not be loaded",), bad.with_config(hidden_act="no")
    ),
    "an epsilon of letters": Case(
        "chat", ("rms_norm_eps is 'a'", "a number"), bad.with_config(rms_norm_eps="a")
    ),
    "quantization a list": Case(
        "compare", ("quantization_config is []",), bad.with_config(quantization_config=[])
    ),
    "generation settings a list": Case(
        "grpo",
        ("generation_config.json", "found list"),
        bad.with_file("generation_config.json", "[]"),
    ),
    "generation settings cut": Case(
        "chat",
        ("generation_config.json", "not valid JSON"),
        bad.with_file("generation_config.json", "{"),
    ),
    # Weights
    "weights of no bytes": Case(
        "sft",
        ("model.safetensors is empty", "copy it"),
        bad.with_file("model.safetensors", ""),
    ),
    "weights cut": Case(
        "ppo",
        ("model.safetensors", "truncated or damaged"),
        lambda p: p.copy(p.model, bad.cut("model.safetensors", 9000)),
    ),
    "weights of noise": Case(
        "export",
        ("model.safetensors", "truncated or damaged"),
        bad.with_file("model.safetensors", bytes(range(256)) * 20),
    ),
    "a layer without weights": Case(
        "chat", ("9 weights", "are not in the files"), bad.with_tensors(no_shards)
    ),
    "weights of another shape": Case(
        "dpo", ("2 weights have other shapes", "q_proj", "(5, 64)"), bad.with_tensors(narrow)
    ),
    "weights that are not numbers": Case(
        "chat",
        ("not finite", "nan"),
        bad.with_tensors(lambda w: {name: tensor * float("nan") for name, tensor in w.items()}),
    ),
    "shards that are not there": Case(
        "rm",
        ("index.json", "2 of 2 files", "model-00001"),
        lambda p: p.copy(p.model, bad.indexed),
    ),
    "weights that link to themselves": Case(
        "sft",
        ("model.safetensors", "no file that can be read"),
        lambda p: p.copy(p.model, link_to_itself),
    ),
    # Adapters and scalar heads
    "an adapter on nothing": Case(
        "merge",
        ("adapter_config.json", "/nowhere/model is not there"),
        bad.adapter(base_model_name_or_path="/nowhere/model"),
    ),
    "an adapter on a number": Case(
        "chat", ("base_model_name_or_path is 5",), bad.adapter(base_model_name_or_path=5)
    ),
    "an adapter on itself": Case(
        "export",
        ("base_model_name_or_path", "itself"),
        lambda p: p.copy(
            p.adapter, lambda f: bad.edit(f, "adapter_config.json", base_model_name_or_path=str(f))
        ),
    ),
    "an adapter of another kind": Case(
        "merge", ("peft_type is 'NOPE'", "LORA"), bad.adapter(peft_type="NOPE")
    ),
    "an adapter of no rank": Case("chat", ("r is '8'",), bad.adapter(r="8")),
    "an adapter of another rank": Case(
        "merge", ("could not be loaded", "size mismatch"), bad.adapter(r=16)
    ),
    "an adapter without weights": Case(
        "sft",
        ("no adapter_model.safetensors",),
        lambda p: p.copy(p.adapter, lambda f: (f / "adapter_model.safetensors").unlink()),
    ),
    "a reward model's head cut": Case(
        "score",
        ("model.safetensors", "truncated or damaged"),
        lambda p: p.copy(p.reward_model, bad.cut("model.safetensors", 5000)),
    ),
    "a reward model that writes": Case("score", ("no scalar head",), lambda p: str(p.model)),
    "a reward model of PPO cut": Case(
        "ppo",
        ("--rm_pretrain", "tokenizer"),
        words=lambda p: [
            "--rm_pretrain",
            p.copy(p.reward_model, lambda f: (f / TOKENIZER).write_text("[]")),
        ],
    ),
    "a critic of no layers": Case(
        "ppo",
        ("num_hidden_layers is 0",),
        words=lambda p: [
            "--critic_pretrain",
            p.copy(p.model, lambda f: bad.edit(f, num_hidden_layers=0)),
        ],
    ),
    # Chat templates
    "a template that divides by 0": Case(
        "sft",
        ("ZeroDivisionError", "fix chat_template"),
        bad.with_file("chat_template.jinja", "{{ 1 // 0 }}"),
    ),
    "a template of types": Case(
        "grpo", ("TypeError",), bad.with_file("chat_template.jinja", "{{ 'a' + 1 }}")
    ),
    "a template that overflows": Case(
        "chat", ("OverflowError",), bad.with_file("chat_template.jinja", "{{ 2.0 ** 100000 }}")
    ),
    "a template that calls itself": Case(
        "serve", ("RecursionError",), bad.with_file("chat_template.jinja", ENDLESS)
    ),
    "a template of gigabytes": Case(
        "prepare",
        ("10,000,000,000 characters",),
        bad.with_file("chat_template.jinja", "{{ 'a' * 10 ** 10 }}"),
    ),
    "a template that says nothing": Case(
        "dpo", ("0 times", "fix chat_template"), bad.with_file("chat_template.jinja", "hello")
    ),
    "a template of depth": Case(
        "compare",
        ("cannot be compiled",),
        bad.with_file("chat_template.jinja", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    ),
    "stops below 0": Case(
        "sft",
        ("stop_ids holds -1",),
        words=bad.flag("conversation_template_config", "t.json", '{"stop_ids": [[-1]]}'),
    ),
    "tags a number": Case(
        "prepare",
        ("response_format_tags", "found 5"),
        words=bad.flag("conversation_template_config", "t.json", '{"response_format_tags": 5}'),
    ),
    # Rows
    "rows of bytes": Case(
        "sft",
        ("rows.jsonl", "malformed", "--max_bad_ratio"),
        rows=bad.rows("rows.jsonl", bytes(range(256)) * 9),
    ),
    "rows in UTF-32": Case(
        "prepare", ("rows.jsonl", "iconv"), rows=bad.rows("rows.jsonl", (ROW * 8).encode("utf-32"))
    ),
    "rows of depth": Case(
        "grpo",
        ("rows.jsonl:1",),
        rows=bad.rows("rows.jsonl", '{"a":' * 50_000 + "1" + "}" * 50_000),
    ),
    "rows of no numbers": Case(
        "dpo",
        ("rows.jsonl:1", "malformed"),
        rows=bad.rows("rows.jsonl", '{"messages": NaN, "chosen": Infinity}\n' * 8),
    ),
    "prompts of nothing to sample": Case(
        "sample", ("rows.jsonl", "no prompt could be asked"), rows=bad.rows("rows.jsonl", "")
    ),
    "responses of other settings": Case(
        "sample",
        ("--output_dir", "written under other settings", "name another directory"),
        words=bad.begun("responses.jsonl", '{"settings": {"temperature": 0.5}}\n'),
    ),
    "responses that are none": Case(
        "sample",
        ("responses.jsonl:1", "damaged"),
        words=bad.begun("responses.jsonl", "[]\n"),
    ),
    "rejection without a threshold": Case(
        "sample",
        ("--threshold is required",),
        words=lambda p: ["--write", "rejection"],
        code=2,
    ),
    "a judge that raises": Case(
        "sample",
        ("reward f raised ZeroDivisionError",),
        words=bad.reward("def f(responses): return [1 / 0]"),
    ),
    "nothing to measure": Case(
        "evaluate", ("rows.jsonl", "no row has a token to measure"), rows=bad.rows("rows.jsonl", "")
    ),
    "a baseline that is none": Case(
        "evaluate",
        ("--baseline", "results.json", "not written by coati evaluate"),
        words=bad.flag("baseline", "results.json", '{"measures": 5}'),
    ),
    "a stride beyond the window": Case(
        "evaluate", ("--stride 4096", "less"), words=lambda p: ["--stride", "4096"], code=2
    ),
    "a text in another encoding": Case(
        "pretrain",
        ("a.txt:1", "not UTF-8 text (byte 128)", "iconv"),
        rows=bad.rows("a.txt", bytes(range(256)) * 9),
    ),
    "a text of nothing": Case(
        "pretrain", ("a.txt", "no rows found"), rows=bad.rows("a.txt", "\n \n\n")
    ),
    "texts of messages": Case(
        "pretrain",
        ("rows.jsonl:1", "messages are written out"),
        rows=bad.rows("rows.jsonl", json.dumps({"text": ROW}) + "\n"),
    ),
    "documents of no text": Case(
        "pretrain",
        ("--documents line", "none among"),
        words=lambda p: ["--documents", "line"],
        code=2,
    ),
    "an optimizer without its machine": Case(
        "sft",
        ("--optim paged_adamw8bit needs a CUDA GPU", "use --optim adamw8bit"),
        words=lambda p: ["--optim", "paged_adamw8bit"],
    ),
    "an optimizer that a plugin cannot have": Case(
        "kto",
        ("--optim adamw8bit", "--plugin gemini", "own Adam alone"),
        words=lambda p: ["--optim", "adamw8bit", "--plugin", "gemini", "--mixed_precision", "bf16"],
        code=2,
    ),
    "noise for preference pairs": Case(
        "dpo",
        ("unknown flag --neftune_alpha", "coati pretrain, sft"),
        words=lambda p: ["--neftune_alpha", "5"],
        code=2,
    ),
    "a tracker that there is not": Case(
        "grpo",
        ("--report_to mlflow", "tensorboard, wandb, trackio or none"),
        words=lambda p: ["--report_to", "mlflow"],
        code=2,
    ),
    "tokens in another encoding": Case(
        "pretrain",
        ("--add_tokens", "not UTF-8 text"),
        words=bad.flag("add_tokens", "tokens.txt", b"\xff\xfe"),
        code=2,
    ),
    "rows a pipe": Case("prepare", ("rows.jsonl",), rows=fifo),
    "rows that end early": Case(
        "kto",
        ("rows.parquet", "not a readable parquet file"),
        rows=bad.rows("rows.parquet", b"PAR1xxPAR1"),
    ),
    "a score a word": Case(
        "ilql",
        ("rows.jsonl:1", "score is 'good', expected a number"),
        rows=bad.rows("rows.jsonl", '{"prompt": "q", "response": "a", "score": "good"}\n' * 3),
    ),
    "prompts of numbers": Case(
        "sample-prompts", ("rows.jsonl", "no prompt found"), rows=bad.rows("rows.jsonl", "1\n")
    ),
    "prepared rows cut": Case(
        "sft",
        ("--dataset", "part-00000", "not readable as prepared rows", "coati prepare"),
        rows=bad.prepared(bad.cut("*.arrow", 200)),
    ),
    "prepared rows a part less": Case(
        "sft", ("--dataset", "2 of the 3 parts"), rows=bad.prepared(a_part_less)
    ),
    "prepared rows of an unknown making": Case(
        "sft",
        ("preparation.json has no tokenizer",),
        rows=bad.prepared(lambda f: (f / "preparation.json").write_text("{}")),
    ),
    "prepared rows whose description is a list": Case(
        "sft",
        ("part-00000", "not readable as prepared rows"),
        rows=bad.prepared(lambda f: (f / "part-00000/dataset_info.json").write_text("[]")),
    ),
    # Teachers
    "no teacher there": Case(
        "gkd", ("--teacher ./none", "no such directory"), words=lambda p: ["--teacher", "./none"]
    ),
    "a teacher without weights": Case(
        "gkd",
        ("model", "weights"),
        words=lambda p: ["--teacher", p.copy(p.model, without_weights)],
    ),
    "a teacher whose weights are cut": Case(
        "gkd",
        ("model.safetensors",),
        words=lambda p: ["--teacher", p.copy(p.model, bad.cut("model.safetensors", 200))],
    ),
    "a teacher of another tokenizer": Case(
        "gkd",
        ("--teacher", "another tokenizer", "token by token"),
        words=lambda p: ["--teacher", bad.tokenizer_json(swapped)(p)],
    ),
    "a teacher that only scores": Case(
        "gkd",
        ("lm_head.weight", "of another kind"),
        words=lambda p: ["--teacher", str(p.reward_model)],
    ),
    "a teacher and a server": Case(
        "gkd",
        ("--teacher and --teacher_url both name a teacher",),
        words=lambda p: ["--teacher_url", "http://127.0.0.1:9"],
        code=2,
    ),
    # Settings in files
    "plugin settings of another kind": Case(
        "sft",
        ("--plugin_args", "overlap_communication is 'yes'", "true or false"),
        words=lambda p: (
            ["--plugin", "zero2", "--plugin_args"]
            + [p.file("p.json", '{"overlap_communication": "yes"}')]
        ),
    ),
    "plugin settings a text for a number": Case(
        "dpo",
        ("--plugin_args", "reduce_bucket_size_in_m is 'big'", "a number"),
        words=lambda p: (
            ["--plugin", "zero2", "--plugin_args"]
            + [p.file("p.json", '{"reduce_bucket_size_in_m": "big"}')]
        ),
    ),
    "LoRA without a rank": Case(
        "sft",
        ("--lora_config", "no r"),
        words=bad.flag("lora_config", "l.json", '{"rank": 8}'),
        code=2,
    ),
    "LoRA of rank true": Case(
        "orpo",
        ("--lora_config", "True"),
        words=bad.flag("lora_config", "l.json", '{"r": true}'),
        code=2,
    ),
    "LoRA of layers 5": Case(
        "sft",
        ("l.json", "target_modules"),
        words=bad.flag("lora_config", "l.json", '{"r": 4, "target_modules": [5]}'),
    ),
    "LoRA on a base of 3 bits": Case(
        "ppo",
        ("l.json", "quantize_base must be one of nf4, int8"),
        words=bad.flag("lora_config", "l.json", '{"r": 4, "quantize_base": "int3"}'),
        code=2,
    ),
    "LoRA with DoRA yes": Case(
        "sft",
        ("l.json", "use_dora must be true or false"),
        words=bad.flag("lora_config", "l.json", '{"r": 4, "use_dora": "yes"}'),
    ),
    "LoRA of targets in one line": Case(
        "dpo",
        ("--lora_target", "line 1", "is no name of a layer"),
        words=lambda p: ["--lora_rank", "4", "--lora_target", p.file("t.txt", "q_proj v_proj")],
        code=2,
    ),
    "LoRA of targets that there are not": Case(
        "sft",
        ("target_modules", "match no linear"),
        words=lambda p: ["--lora_rank", "4", "--lora_target", p.file("t.txt", "no_proj")],
    ),
    "LoRA of no alpha": Case(
        "grpo",
        ("l.json", "lora_alpha"),
        words=bad.flag("lora_config", "l.json", '{"r": 4, "lora_alpha": NaN}'),
    ),
    "LoRA of a billion": Case(
        "dpo", ("r must be",), words=bad.flag("lora_config", "l.json", '{"r": 1000000000}')
    ),
    "YAML with a date": Case(
        "sft", ("c.yaml:1", "lr"), words=bad.flag("config", "c.yaml", "lr: 2020-01-01\n"), code=2
    ),
    "YAML of two documents": Case(
        "rm",
        ("c.yaml:2", "YAML"),
        words=bad.flag("config", "c.yaml", "lr: 1\n---\nlr: 2\n"),
        code=2,
    ),
    "hosts of bytes": Case(
        "sft", ("--hostfile", "UTF-8"), words=bad.flag("hostfile", "h", b"\xff\xfe\0"), code=2
    ),
    # Outputs
    "a file as directory": Case(
        "sft",
        ("--save_dir", "is a file", "name a directory"),
        words=bad.flag("save_dir", "file", "x"),
    ),
    "below a file": Case(
        "grpo", ("--save_dir", "is a file", "another place"), words=bad.below_a_file("save_dir")
    ),
    "a file system that cannot be written": Case(
        "dpo",
        ("--save_dir /proc/run", "cannot be written"),
        words=lambda p: ["--save_dir", "/proc/run"],
    ),
    "no name at all": Case("kto", ("--save_dir is ''",), words=lambda p: ["--save_dir", ""]),
    "a name too long": Case("rm", ("--save_dir", "255"), words=lambda p: ["--save_dir", "x" * 300]),
    # Outputs below a file, and named as a directory that is there
    **{
        f"{name} below a file": Case(verb, said, words=bad.below_a_file(flag))
        for name, (verb, flag, said) in {
            "a log directory": ("ppo", "log_dir", ("--log_dir",)),
            "an export": ("export", "output_dir", ("--output_dir", "is a file")),
            "prepared rows": ("prepare", "data_arrow_output_dir", ("--data_arrow_output_dir",)),
            "scores": ("score", "output", ("--output",)),
        }.items()
    },
    **{
        f"{name} that is a directory": Case(verb, (flag, "is a directory"), words=bad.folder(flag))
        for name, (verb, flag) in {
            "flags": ("sft", "--config_file"),
            "a transcript": ("chat", "--transcript"),
            "a configuration": ("init", "--output"),
        }.items()
    },
    # Code of a user's own
    **{
        f"a reward {name}": Case(verb, said, words=bad.reward(text))
        for name, (verb, said, text) in {
            "that exits": (
                "grpo",
                ("reward f raised SystemExit: 0", "reward.py:2"),
                "import sys\ndef f(responses): sys.exit(0)",
            ),
            "that exits without a code": (
                "grpo",
                ("reward f raised SystemExit", "reward.py:1"),
                "def f(responses): raise SystemExit(None)",
            ),
            "that interrupts": (
                "grpo",
                ("KeyboardInterrupt", "reward.py:1"),
                "def f(responses): raise KeyboardInterrupt",
            ),
            "that closes": (
                "compare",
                ("reward f raised GeneratorExit", "reward.py:1"),
                "def f(responses): raise GeneratorExit",
            ),
            "with a class of its own": (
                "grpo",
                ("reward f raised Mine: x", "reward.py:2"),
                "class Mine(BaseException): pass\ndef f(responses): raise Mine('x')",
            ),
            "file that exits": (
                "grpo",
                ("reward", "SystemExit", "reward.py:2"),
                "import sys\nsys.exit(0)\ndef f(responses): return 1",
            ),
        }.items()
    },
    "a reward of pairs that is NaN": Case(
        "online-dpo",
        ("reward f returned nan", "expected a finite number"),
        words=bad.reward("def f(responses): return [float('nan')] * len(responses)"),
    ),
    "a judge of pairs that sees one of them": Case(
        "online-dpo",
        ("--judge_prompt: the text has no {response_b}",),
        words=lambda place: [
            *("--reward_functions", "pairwise_judge", "--judge_url", "http://127.0.0.1:1/v1"),
            *("--judge_model", "m", "--judge_prompt", place.file("ask.txt", "{response_a}")),
        ],
        code=2,
    ),
    "a pair that weighs less than nothing": Case(
        "dpo",
        ("weight is -1, expected a number of 0 or more",),
        rows=bad.rows(
            "pairs.jsonl",
            '{"prompt": "q", "chosen": "a", "rejected": "b", "weight": -1}\n' * 3,
        ),
    ),
    "a reward file of bytes": Case(
        "grpo", ("reward", "reward.py"), words=bad.reward(b"\xff\xfe\0"), code=2
    ),
    # Runs of before
    "a state a list": Case(
        "sft",
        ("running_states.json", "found list"),
        words=bad.checkpoint(lambda f: (f / STATE).write_text("[]")),
    ),
    "a state of nothing": Case(
        "sft",
        ("--checkpoint_path", "no epoch", "earlier checkpoint"),
        words=bad.checkpoint(lambda f: (f / STATE).write_text("{}")),
    ),
    "a state at step a": Case(
        "sft",
        ("--checkpoint_path", "step is 'a'"),
        words=bad.checkpoint(lambda f: bad.edit(f, STATE, step="a")),
    ),
    "a run whose flags are a list": Case(
        "report",
        ("arguments.json", "JSON object"),
        lambda p: _run(p, "arguments.json", "[]"),
    ),
    "a run of bytes": Case(
        "report",
        ("--run_dir", "no metric in any of them"),
        lambda p: _run(p, "metrics.jsonl", b"\xff\xfe\0\n\xff\n"),
    ),
}
AS_A_PROCESS = ("no layers", "a reward that exits", "prepared rows cut")


def _run(place: Place, name: str, content: str | bytes) -> str:
    """A run's directory with that file."""
    place.file("metrics.jsonl", '{"step": 1, "train/loss": 1.0}\n')
    place.file(name, content)
    return str(place.folder)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(role: str, text: str) -> dict:
    return {"from": role, "content": text}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Place:
    """Good inputs of every kind: what the cases damage."""
    folder = tmp_path_factory.mktemp("good")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.chdir(folder)
    model = folder / "model"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    asked = [[said("user", f"q{i}")] for i in range(16)]
    kinds = {
        "sft": [{"messages": [*q, said("assistant", f"yes {i % 7}")]} for i, q in enumerate(asked)],
        "pairs": [
            {
                "context": q,
                "chosen": [said("assistant", "yes")],
                "rejected": [said("assistant", "no")],
            }
            for q in asked
        ],
        "prompts": [{"messages": q} for q in asked],
        "kto": [
            {"prompt": f"q{i}", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)}
            for i in range(16)
        ],
    }
    rows = {kind: folder / f"{kind}.jsonl" for kind in kinds}
    for kind, file in rows.items():
        file.write_text(lines(kinds[kind]))
    inputs = Place(
        folder, model, folder / "rm", folder / "adapter", folder / "x", folder / "arrow", rows
    )
    made = {"rm": "rm", "adapter": "sft"}
    more = {"rm": [], "adapter": ["--lora_rank", "4"]}
    for name, verb in made.items():
        words = [*good_words(verb, inputs, str(model), None), *more[name]]
        assert ended(verb, [*words, "--save_dir", str(folder / f"run-{name}")])[0] == 0
        shutil.copytree(folder / f"run-{name}" / "modeling", folder / name)
    words = [*good_words("sft", inputs, str(model), None), "--save_interval", "1"]
    assert ended("sft", [*words, "--save_dir", str(folder / "run")])[0] == 0
    words = [*good_words("prepare", inputs, str(model), None), "--num_spliced_dataset_bins", "3"]
    assert ended("prepare", [*words, "--data_arrow_output_dir", str(folder / "arrow")])[0] == 0
    checkpoint = folder / "run" / "epoch-0_step-1"
    yield Place(
        folder, model, folder / "rm", folder / "adapter", checkpoint, folder / "arrow", rows
    )
    patch.undo()


@pytest.fixture
def place(good, tmp_path) -> Place:
    return Place(tmp_path, *list(vars(good).values())[1:])


def words_of(case: Case, place: Place) -> list[str]:
    standard = {"score": place.reward_model, "merge": place.adapter}.get(case.verb, place.model)
    model = str(standard) if case.model is None else case.model(place)
    rows = None if case.rows is None else case.rows(place)
    return [*good_words(case.verb, place, model, rows), *(case.words(place) if case.words else [])]


def check(case: Case, code: int | str, error: str) -> None:
    assert code == case.code, error[-2000:]
    assert "Traceback" not in error
    start = error.rindex(f"coati {case.verb}: error: ")
    for part in case.said:
        assert part in error[start:], error[start:]
    assert len(error[start:].splitlines()[0]) < 1200


@pytest.mark.parametrize("name", CASES)
def test_malformed(place, name):
    forget_warnings()
    case = CASES[name]
    check(case, *ended(case.verb, words_of(case, place)))
    assert not list((place.folder / "out").glob("**/modeling"))


@pytest.mark.parametrize("name", AS_A_PROCESS)
def test_as_a_process(place, name):
    case = CASES[name]
    run = subprocess.run(
        [sys.executable, "-m", "coati", case.verb, *words_of(case, place)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    error = run.stderr.replace("__main__.py: error:", f"coati {case.verb}: error:")
    check(
        case,
        run.returncode,
        error.replace(f"coati {case.verb} {case.verb}:", f"coati {case.verb}:"),
    )


def test_every_verb_that_reads_anything_has_cases():
    reading = set(command.names()) - {"bench", "cache", "completion", "env", "measure"}
    assert {case.verb for case in CASES.values()} >= reading - {"doctor"}
    assert len(CASES) >= 100
