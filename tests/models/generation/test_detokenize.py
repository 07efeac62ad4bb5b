"""Text that comes token by token is the text of all tokens, for every kind of tokenizer."""

import random
import re
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import coati
from coati.models.generation.detokenize import Detokenizer, decode
from tests.tiny import tiny_tokenizer

CORPUS = [
    "hello there, how are you today? it's names = [ 'mary', 'sam' ] and more . . . text !",
    "def f(x):\n    return {x: [1, 2, 3]}\t# done\n\n",
    "你好，世界。ありがとう 안녕하세요 مرحبا بالعالم שלום é à ü",
]
ALPHABETS = [
    "abcdefgh ,.!?'[](){}=:;#\n\t  ",
    "你好世界，。ありがと안녕",
    "😀😎🏳️‍🌈👩‍👩‍👧‍👦🇩🇪👍🏽",
    "éàüñe\u0301a\u0300o\u0323\u0308",
    "مرحباשלום\u200f\u200e ",
    "\x00\x01\x07\x1b\x7f\u200b\ufeff\ufffd\u2028",
]


def texts(count=300):
    drawn = random.Random(7)
    made = [*CORPUS, "", " ", "  a  b ", "it 's fine , really . Wait ... what ?", "\ufffd\ufffd"]
    while len(made) < count:
        alphabets = drawn.sample(ALPHABETS, drawn.randint(1, 3))
        made.append(
            "".join(drawn.choice(drawn.choice(alphabets)) for _ in range(drawn.randint(1, 40)))
        )
    return made


def fast(core, **special):
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "</s>"} | special)


def trained(model, trainer, pre=None, decoder=None, normalizer=None):
    core = Tokenizer(model)
    if normalizer is not None:
        core.normalizer = normalizer
    if pre is not None:
        core.pre_tokenizer = pre
    core.train_from_iterator(CORPUS * 3, trainer)
    if decoder is not None:
        core.decoder = decoder
    return core


def byte_level():
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = fast(trained(models.BPE(), trainer, pre, decoders.ByteLevel()), pad_token="<pad>")
    # merged over the border of two characters, as in real vocabularies
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("né", special=False)])
    return tokenizer


def llama(strip=True):
    """Byte fallback with a prefix space: the decoder of Llama 2, Mistral, Gemma (without strip)."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    pieces = [
        "▁",
        *sorted(set("".join(CORPUS)) - set("你\n\t ")),
        "▁h",
        "▁t",
        "▁it",
        "▁▁",
        "he",
        "ll",
    ]
    vocabulary |= {piece: len(vocabulary) + k for k, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁", "t"), ("▁", "▁"), ("h", "e"), ("l", "l")]
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replaced = normalizers.Replace(" ", "▁")
    if strip:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        core.normalizer = replaced
    core.decoder = decoders.Sequence(steps)
    return fast(core, unk_token="<unk>")


def metaspace(byte_fallback=False):
    pieces = [("<unk>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] if byte_fallback else []
    pieces += [(each, -9.0) for each in ["▁", *sorted(set("".join(CORPUS)) - set("你 "))]]
    pieces += [("▁hello", -3.0), ("▁there", -3.0), ("▁are", -3.0), ("\ufffd", -9.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback()] if byte_fallback else []
    core.decoder = decoders.Sequence([*steps, decoders.Metaspace()])
    return fast(core, unk_token="<unk>")


def word_piece(cleanup):
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "</s>", "[PAD]"], show_progress=False
    )
    core = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=cleanup),
    )
    return fast(core, unk_token="[UNK]", pad_token="[PAD]")


def word_ends():
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "</s>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return fast(
        trained(model, trainer, pre_tokenizers.Whitespace(), decoders.BPEDecoder()),
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """Files of sentencepiece models, {byte fallback: path}."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20).replace("\x00", ""), encoding="utf-8")
    for byte_fallback in (False, True):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / f"{byte_fallback}"),
            vocab_size=420 if byte_fallback else 170,
            model_type="bpe" if byte_fallback else "unigram",
            byte_fallback=byte_fallback,
            character_coverage=0.98 if byte_fallback else 1.0,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return {
        byte_fallback: str(folder / f"{byte_fallback}.model") for byte_fallback in (False, True)
    }


def with_cleanup(tokenizer):
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-level, cleanup": lambda: with_cleanup(byte_level()),
    "byte fallback, prefix space": llama,
    "byte fallback, cleanup": lambda: with_cleanup(llama()),
    "byte fallback, no prefix": lambda: llama(strip=False),
    "metaspace": metaspace,
    "metaspace, byte fallback": lambda: metaspace(byte_fallback=True),
    "word pieces": lambda: word_piece(False),
    "word pieces, cleanup": lambda: with_cleanup(word_piece(True)),
    "word ends": word_ends,
}


def of_sentencepiece(name, spm, folder):
    """A tokenizer that transformers makes of a sentencepiece file; which of them decode in Python
    depends on its version."""
    import transformers

    if name == "ByT5Tokenizer":
        return transformers.ByT5Tokenizer(extra_ids=0)
    file = folder / "tokenizer.model"
    file.write_bytes(Path(spm[name != "BertGenerationTokenizer"]).read_bytes())
    if name == "LlamaTokenizer":
        return transformers.LlamaTokenizer.from_pretrained(folder)
    return getattr(transformers, name)(vocab_file=str(file))


FILES = ["GPTSw3Tokenizer", "BertGenerationTokenizer", "LlamaTokenizer", "ByT5Tokenizer"]


@pytest.fixture(scope="module", params=[*KINDS, *FILES])
def tokenizer(request, spm, tmp_path_factory):
    make = KINDS.get(request.param)
    return make() if make else of_sentencepiece(request.param, spm, tmp_path_factory.mktemp("made"))


def streamed(tokenizer, ids, before=()):
    stream = Detokenizer(tokenizer, before)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()], stream


def ids_of(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def random_ids(tokenizer, count, drawn):
    """What an untrained model says: ids of any kind, skipped ones and unfinished bytes as well."""
    special = [*tokenizer.all_special_ids] * 3
    return [drawn.choice([drawn.randrange(len(tokenizer)), *special[:1]]) for _ in range(count)]


def test_the_pieces_of_300_texts_are_one_decode_of_all_ids(tokenizer):
    drawn = random.Random(3)
    cases = [ids_of(tokenizer, text) for text in texts()]
    cases += [random_ids(tokenizer, drawn.randint(1, 60), drawn) for _ in range(100)]
    said = 0
    for number, ids in enumerate(cases):
        pieces, _ = streamed(tokenizer, ids)
        assert "".join(pieces) == decode(tokenizer, ids), (number, ids)
        said += any(pieces[:-1])
    assert said > len(cases) / 2  # it streams


def test_text_comes_back_as_it_was_written():
    """Cleaning up would take spaces before punctuation and quotes."""
    tokenizer = with_cleanup(byte_level())
    for text in texts():
        assert decode(tokenizer, ids_of(tokenizer, text)) == text


def test_tokens_become_text_in_one_place():
    """Nothing that a user or a reward sees is decoded with clean-up."""
    places = {}
    for path in Path(coati.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        calls = re.findall(r"tokenizer\S*\.(?:batch_)?decode\((?:[^()]|\([^()]*\))*\)", source)
        if calls:
            places[path.stem] = all("clean_up_tokenization_spaces=False" in call for call in calls)
    names = ("detokenize", "chat_encoder", "template_file", "tokenizer_fit")
    assert places == dict.fromkeys(names, True)


def test_a_continuation_is_the_rest_of_one_decode(tokenizer):
    """With the prompt's ids before it, a response keeps the space that its first word begins
    with."""
    drawn = random.Random(5)
    for text in texts(60):
        ids = ids_of(tokenizer, "hello there" + text)
        cut = drawn.randint(1, 3)
        before, rest = ids[:cut], ids[cut:]
        whole = decode(tokenizer, ids)
        if not whole.startswith(decode(tokenizer, before)):
            continue
        pieces, _ = streamed(tokenizer, rest, before=before)
        assert "".join(pieces) == whole[len(decode(tokenizer, before)) :]


def test_no_piece_changes_later_and_characters_come_whole():
    """Bytes of a run are replaced as a whole when the run turns out to be no UTF-8."""
    tokenizer = llama()
    bytes_of = {byte: tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    word = tokenizer.convert_tokens_to_ids("he")
    good = [bytes_of[byte] for byte in "你😀".encode()]
    assert streamed(tokenizer, [word, *good, word])[0] == ["he", *[""] * 7, "你😀he", ""]
    bad = [word, *good, bytes_of[0xE4], tokenizer.eos_token_id, bytes_of[0xBD], word]
    assert streamed(tokenizer, bad)[0] == ["he", *[""] * 10, "\ufffd" * 9 + "he", ""]


def test_text_that_is_garbage_still_comes():
    tokenizer = byte_level()
    lone = tokenizer.convert_tokens_to_ids("ä")  # the byte 0xE4
    pieces, _ = streamed(tokenizer, [lone] * 100)
    assert pieces[:3] == ["", "\ufffd", "\ufffd"] and "".join(pieces) == "\ufffd" * 100


class Counted:
    """A tokenizer that counts the ids that it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **options):
        self.ids += len(ids)
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback, prefix space", "word pieces"])
@pytest.mark.parametrize("what", ["words", "skipped", "bytes"])
def test_the_cost_is_linear(kind, what):
    tokenizer = Counted(KINDS[kind]())
    lone = {"byte-level": "ä", "byte fallback, prefix space": "<0xE4>", "word pieces": "##e"}[kind]
    unit = {
        "words": ids_of(tokenizer.tokenizer, "hello there")[:2],
        "skipped": [tokenizer.eos_token_id] * 2,
        "bytes": [tokenizer.convert_tokens_to_ids(lone)] * 2,
    }[what]
    ids = ids_of(tokenizer.tokenizer, "he") + unit * 1000
    streamed(tokenizer, ids)
    assert tokenizer.ids < 25 * len(ids)  # each time the whole: 1,000 times as many


def test_special_tokens_that_are_shown():
    """Those that mark thoughts and calls are text, the others are skipped as ever."""
    tokenizer = tiny_tokenizer()
    shown, skipped = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    ids = tokenizer("hello there").input_ids
    text = Detokenizer(tokenizer, shown=frozenset([shown]))
    given = [shown, *ids, skipped, shown, *ids, skipped]
    pieces = "".join([text.push(token) for token in given]) + text.finish()
    assert pieces == "<|im_start|>hello there<|im_start|>hello there" == text.text
    plain = Detokenizer(tokenizer)
    assert "".join([plain.push(token) for token in given]) + plain.finish() == "hello there" * 2
