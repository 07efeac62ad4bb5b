"""Ids by the memory of words are the tokenizer's own, and what they cannot be sure of is left to
it; and texts that need not be decoded are what decoding would give."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from coati.dataset.chat import word_cache as words
from coati.dataset.chat.chat_encoder import ChatEncoder
from coati.dataset.chat.word_cache import LLAMA3, QWEN2, Words
from tests.dataset.makers import byte_level, chatml_tokenizer
from tests.tiny import SPECIAL

LEARNED = [
    "I'll say it's 1234 o'clock  and   we're HERE'S\n\n  done!!!\n",
    "Ærø, naïve “quotes” – Привет … 12.5 €\r\n\t x = y_z",
]
BYTES = {"add_prefix_space": False, "use_regex": False}
PARTINGS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama3": lambda: by_pattern(LLAMA3),
    "qwen2": lambda: by_pattern(QWEN2),
}


def by_pattern(pattern: str):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(**BYTES)]
    )


def trained(parting, normalizer=None) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = parting
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(LEARNED * 4, trainer)
    if normalizer is not None:
        core.normalizer = normalizer
    return core


CORES = {name: trained(parting()) for name, parting in PARTINGS.items()}
CORES["qwen2"].normalizer = normalizers.NFC()
# Much white space, apostrophes and markers: where words begin and end is decided there.
PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'",
        "'s",
        "'LL",
        "’s",
        "1",
        "23",
        "_",
        "!?",
        "é",
        "Я",
        *SPECIAL,
    ]
)
TEXTS = st.lists(
    st.one_of(PIECES, st.text(st.sampled_from("abt'3 .\nž€«"), max_size=6)), max_size=14
).map("".join)


@pytest.mark.parametrize("name", CORES)
@settings(deadline=None, max_examples=80)
@given(text=TEXTS)
def test_ids_are_the_tokenizers_own(name, text):
    found = Words.of(CORES[name]).encode(text)
    assert found == (CORES[name].encode(text, add_special_tokens=False).ids, [])


@pytest.mark.parametrize("name", CORES)
def test_every_character_that_is_looked_up_is_parted_as_the_tokenizer_does(name):
    core = CORES[name]
    by_words = Words.of(CORES[name])
    sure = [c for c in map(chr, range(0x2500)) if by_words.encode(c) is not None]
    assert len(sure) > 400 and "é" in sure and "Ж" in sure
    for one in sure:
        for text in (f"a{one}b {one}1{one}\n{one}  {one}", f"'{one} {one}'s{one}{one}"):
            assert by_words.encode(text)[0] == core.encode(text, add_special_tokens=False).ids, hex(
                ord(one)
            )


@pytest.mark.parametrize(
    "text",
    ["non\u00a0breaking", "½ cup", "x²", "你好", "🙂", "e\u0301", "'\u017f", "bell\a", "\u2028"],
)
def test_other_characters_are_left_to_the_tokenizer(text):
    assert all(Words.of(core).encode(text) is None for core in CORES.values())


def test_the_tokens_of_spans_and_borders_inside_words():
    by_words = Words.of(CORES["gpt2"])
    text = "<|im_start|>we're here<|im_end|>"
    ids, ranges = by_words.encode(text, [(12, 22), (22, 32)], {12, 22, 32})
    assert ids[0] == SPECIAL.index("<|im_start|>") and ids[-1] == SPECIAL.index("<|im_end|>")
    assert ranges == [(1, len(ids) - 1), (len(ids) - 1, len(ids))]
    assert by_words.encode(text, [], {12, 13}) is None  # between w and e
    assert by_words.encode("", [(0, 0)], {0}) == ([], [(0, 0)])


def odd_token(**how) -> Tokenizer:
    core = trained(PARTINGS["gpt2"]())
    core.add_special_tokens([AddedToken("<odd>", **how)])
    return core


def with_dropout() -> Tokenizer:
    layout = json.loads(CORES["gpt2"].to_str())
    layout["model"]["dropout"] = 0.1
    return Tokenizer.from_str(json.dumps(layout))


def two_kinds() -> Tokenizer:
    core = trained(PARTINGS["gpt2"]())
    core.add_tokens([AddedToken("<one>", normalized=True), AddedToken("<other>", normalized=False)])
    return core


@pytest.mark.parametrize(
    "core",
    [
        trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        trained(pre_tokenizers.ByteLevel(**BYTES)),
        trained(pre_tokenizers.Metaspace()),
        trained(by_pattern(r"\p{L}+|[^\p{L}]")),
        trained(PARTINGS["gpt2"](), normalizers.Lowercase()),
        odd_token(lstrip=True),
        odd_token(single_word=True),
        with_dropout(),
        two_kinds(),
    ],
)
def test_tokenizers_of_other_kinds_are_asked_themselves(core):
    assert Words.of(core) is None


def test_without_a_way_to_part_words_the_encoder_asks_the_tokenizer():
    tokenizer = byte_level(merges=[("a", "b")])
    assert ChatEncoder(tokenizer).encode("cab", [(0, 2)])[1] == tokenizer.encode(
        "ca"
    ) + tokenizer.encode("b")


def test_the_memory_stays_small(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 8)
    by_words = Words.of(CORES["gpt2"])
    text = " ".join("abcdefghijklmnop") + "<|im_end|>" + "x" * 50 + "<|im_end|>"
    for _ in range(2):
        assert by_words.encode(text)[0] == CORES["gpt2"].encode(text, add_special_tokens=False).ids
    assert len(by_words._memory) <= 9 and "x" * 50 not in by_words._memory


@pytest.mark.parametrize("text", ["hi there, it's fine\n", "naïve – 12", "家族 and more"])
def test_the_encoder_gives_the_same_with_and_without(text, monkeypatch):
    tokenizer = chatml_tokenizer()
    whole = f"<|im_start|>assistant\n{text}<|im_end|>\n"
    start = len("<|im_start|>assistant\n")
    end = len(whole) - 1
    one = ChatEncoder(tokenizer, "<|im_end|>").encode(whole, [(start, end)], others=[(3, 5)])
    monkeypatch.setattr(ChatEncoder, "_words", None)
    assert one == ChatEncoder(tokenizer, "<|im_end|>").encode(
        whole, [(start, end)], others=[(3, 5)]
    )


def test_a_memory_that_differs_from_the_tokenizer_is_found_out_and_left(monkeypatch, capsys):
    encoder = ChatEncoder(chatml_tokenizer(), "<|im_end|>")
    text = "hi there"
    right = encoder.encode(text, [])
    monkeypatch.setattr(type(encoder._words), "encode", lambda *_: ([0], []))
    encoder = ChatEncoder(chatml_tokenizer(), "<|im_end|>")
    assert encoder.encode(text, []) == right and encoder._words is None
    assert "does not fit this tokenizer" in capsys.readouterr().err


# Beside what is sure: composed and decomposed letters, which NFC makes one, and many bytes each.
ANY_TEXT = st.one_of(
    TEXTS, st.text(st.sampled_from("ae\u0301é\u212b家族🤖 \u200d<|\n"), max_size=12)
)


@pytest.mark.parametrize("name", CORES)
@settings(deadline=None, max_examples=80)
@given(text=ANY_TEXT)
def test_what_is_said_to_be_spelled_is_what_decoding_gives(name, text):
    core = CORES[name]
    ids = core.encode(text, add_special_tokens=False).ids
    if Words.of(core).spell(text):
        assert core.decode(ids, skip_special_tokens=False) == text
    else:  # NFC alone may change a text
        assert name == "qwen2"


def test_texts_that_a_normalizer_may_change_are_decoded():
    assert Words.of(CORES["qwen2"]).spell("naïve – 12") and Words.of(CORES["gpt2"]).spell("e\u0301")
    assert not Words.of(CORES["qwen2"]).spell("e\u0301")


def without_a_byte() -> Tokenizer:
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate("ab")}, []))
    core.pre_tokenizer = PARTINGS["gpt2"]()
    core.decoder = decoders.ByteLevel()
    return core


def decoded_otherwise(decoder) -> Tokenizer:
    core = trained(PARTINGS["gpt2"]())
    core.decoder = decoder
    return core


def no_bytes_of_itself() -> Tokenizer:
    core = trained(PARTINGS["gpt2"]())
    core.add_tokens([AddedToken("é", normalized=False)])  # as a byte it is half a character
    return core


@pytest.mark.parametrize(
    "core, text",
    [
        (without_a_byte(), "abc"),
        (decoded_otherwise(None), "a b"),
        (
            decoded_otherwise(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
            " a",
        ),
        (no_bytes_of_itself(), "é"),
    ],
)
def test_tokenizers_whose_ids_do_not_spell_the_text_are_found(core, text):
    ids = core.encode(text, add_special_tokens=False).ids
    assert core.decode(ids, skip_special_tokens=False) != text
    assert not Words.of(core).spell(text)


def test_a_text_that_decodes_to_another_is_found_out(monkeypatch):
    encoder = ChatEncoder(chatml_tokenizer(), "<|im_end|>")
    assert encoder.spells("hi there")
    monkeypatch.setattr(encoder, "decode", lambda ids: "hi")
    encoder.encode("hi there", [])
    assert not encoder.spells("hi there")
