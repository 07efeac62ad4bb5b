"""Loading tokenizers: what works, and what the message says when it does not."""

import json

import pytest
import transformers

from coati.models.tokenizer import check_vocabulary, find_tokenizer, load_tokenizer
from tests.models.test_loading import edit
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    tiny_llama(layers=1).config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_an_unknown_tokenizer_class_is_named_by_line_with_the_one_that_is_meant(directory):
    edit(directory / "tokenizer_config.json", tokenizer_class="LLaMATokenizer")
    lines = (directory / "tokenizer_config.json").read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "LLaMATokenizer" in line)
    with pytest.raises(
        ValueError, match=rf'tokenizer_config.json:{number}: .*"LLaMATokenizer".*"LlamaTokenizer"'
    ):
        load_tokenizer(directory)


def test_a_missing_pad_token_becomes_the_end_token(directory, capsys):
    edit(directory / "tokenizer_config.json", pad_token=None)
    # transformers 5 writes all into the one file.
    files = [
        file
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        if (file := directory / name).exists()
    ]
    edit(files[-1], pad_token=None)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2 and tokenizer.is_fast
    assert "no pad token" in capsys.readouterr().err
    for file in files:
        edit(file, eos_token=None)
    with pytest.raises(ValueError, match="neither eos_token nor pad_token"):
        load_tokenizer(directory)


def test_a_class_of_another_kind_of_tokenizer_does_not_cost_the_spaces(directory, capsys):
    """DeepSeek's files name Llama's class, which transformers 5 gives pieces of SentencePiece."""
    edit(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    text = "hello there, how are you today?\n 12345"
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == tiny_tokenizer().encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template == tiny_tokenizer().chat_template
    if transformers.__version__.startswith("5"):
        said = capsys.readouterr().err
        assert "read by LlamaTokenizer, which its configuration names, the tokenizer loses" in said


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(capsys):
    check_vocabulary(tiny_llama(layers=1), tiny_tokenizer())
    assert capsys.readouterr().err == ""
    with pytest.raises(
        ValueError, match=r"(?s)has \d+ tokens .*model's vocabulary 200; .*--tokenizer_dir"
    ):
        check_vocabulary(tiny_llama(layers=1, vocab_size=200), tiny_tokenizer())
    check_vocabulary(tiny_llama(layers=1, vocab_size=4000), tiny_tokenizer())
    assert "do they belong together" in capsys.readouterr().err


def test_an_adapter_without_a_tokenizer_names_its_bases(directory, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(directory)})
    )
    assert find_tokenizer(directory) == str(directory) and not capsys.readouterr().err
    assert find_tokenizer(adapter) == str(directory)
    assert f"that of its base {directory} is used" in capsys.readouterr().err
    tiny_tokenizer().save_pretrained(adapter)
    assert find_tokenizer(adapter) == str(adapter)
