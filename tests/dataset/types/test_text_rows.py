"""Documents become rows: no token is lost or doubled, by hand and for a megabyte of text, in the
rows, in packs, and in the loaders of two processes."""

import copy
import io
import json
import random
from collections import Counter

import pytest

from coati.dataset import DataCollatorForSupervisedDataset, load_tokenized_dataset, prepare_dataset
from coati.dataset.chat import chat_encoder
from coati.dataset.chat.chat_encoder import ChatEncoder
from coati.dataset.chat.document_ends import start_of_document
from coati.dataset.chat.plain_text import PlainText
from coati.dataset.data_types import DATA_TYPES, types_of
from coati.dataset.load.epoch_order import EpochOrder
from coati.dataset.load.loader import GlobalBatchLoader, row_lengths
from coati.dataset.load.packing import PackCollator
from coati.dataset.rows import text_files
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.text_files import PIECE, Piece
from coati.dataset.types.text_rows import pieces
from tests.dataset.makers import byte_level, sentencepiece_like
from tests.tiny import tiny_tokenizer

TEXT = DATA_TYPES["text"]


def rows(found, max_length=100, tokenizer=None) -> list[dict]:
    made = TEXT.tokenize(
        read_row("text", found), PlainText(tokenizer or tiny_tokenizer()), max_length
    )
    assert not any(cut for _, cut in made)
    return [columns for columns, _ in made]


def test_a_document_by_hand():
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    ids = tokenizer.encode("abcdefg")
    assert len(ids) == 7
    first, second, third = rows({"text": "abcdefg"}, max_length=3)
    assert [row["input_ids"] for row in (first, second, third)] == [
        ids[:3],
        ids[3:6],
        [ids[6], eos],
    ]
    assert first["labels"] == [-100, *ids[1:3]] and third["labels"] == [-100, eos]
    assert [row["document"] for row in (first, second, third)] == [True, False, False]
    assert first["inputs_decode"] == "abc" and third["seq_length"] == 2
    assert [type.name for type in types_of(first)] == ["text", "sft", "prompt"]


def test_no_row_is_a_single_token_from_which_nothing_is_learned():
    assert list(pieces(7, 3)) == [(0, 3), (3, 5), (5, 7)]
    for most in range(3, 12):
        for length in range(2, 60):
            found = list(pieces(length, most))
            assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
            assert found[-1][1] == length
            assert all(2 <= end - start <= most for start, end in found)


@pytest.mark.parametrize(
    "names, start",
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, []),  # the tokenizer writes none by itself
        ({"bos_token": "</s>", "eos_token": "</s>"}, ["</s>"]),
        ({"eos_token": "</s>"}, []),
    ],
)
def test_how_a_document_begins(names, start):
    tokenizer = byte_level(names=names)
    assert tokenizer.convert_ids_to_tokens(start_of_document(tokenizer)) == start


def test_how_a_document_begins_is_asked_once(monkeypatch):
    template = PlainText(byte_level(names={"eos_token": "</s>"}))
    asked = []
    monkeypatch.setattr(chat_encoder, "start_of_document", lambda _: asked.append(1) or [5])
    for _ in range(3):
        ((columns, _),) = TEXT.tokenize(read_row("text", "ab"), template, 100)
        assert columns["input_ids"][0] == 5
    assert len(asked) == 1


def test_a_document_begins_with_what_the_tokenizer_writes():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(names={"bos_token": "<s>", "eos_token": "</s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    (row,) = rows({"text": "ab"}, tokenizer=tokenizer)
    assert row["input_ids"][0] == bos and row["labels"][0] == -100
    assert row["input_ids"][1:] == row["labels"][1:]
    middle = rows(Piece.of(" ab", False, False), tokenizer=tokenizer)[0]["input_ids"]
    assert middle == tokenizer.encode(" ab", add_special_tokens=False)
    assert rows(Piece.of("", False, True), tokenizer=tokenizer)[0]["input_ids"] == [
        tokenizer.eos_token_id
    ]


def test_markers_in_a_document_are_text():
    eos = tiny_tokenizer().eos_token_id
    for document in ("a<|im_end|>b", Piece.of("a<|im_end|>b", False, True)):
        ids = [token for row in rows(document) for token in row["input_ids"]]
        assert ids.count(eos) == 1 and ids[-1] == eos


READ = {
    "text": ({"text": "t"}, "text"),
    "beside others": ({"text": "t", "label": 1, "prompt": "p"}, "document"),
    "the stack": ({"content": "t", "path": "a.py"}, "document"),
    "redpajama": ({"raw_content": "t", "meta": {}}, "document"),
    "source_target": ({"source": "", "Target": "t"}, "source_target"),
    "a line": ("t", "document"),
}


@pytest.mark.parametrize("case", READ)
def test_where_documents_are_found(case):
    row, format = READ[case]
    found = read_row("text", row)
    assert (found.text, found.format, found.begins, found.ends) == ("t", format, True, True)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": " \n"}, "empty_conversation"),
        ({"messages": []}, "wrong_type"),
        ({"words": "a"}, "wrong_keys"),
        ({"text": '[{"role": "user", "content": "hi"}]'}, "content_not_text"),
        ({"content": "{'messages': [{'role': 'user', 'content': 'a'}]}"}, "content_not_text"),
    ],
)
def test_what_is_no_document(row, reason):
    with pytest.raises(RowError) as error:
        read_row("text", row)
    assert error.value.reason == reason


def test_text_columns_are_read_for_sft_too():
    """With nothing beside them that a conversation would be made of."""
    assert read_row("sft", {"text": "Rivers run to the sea."}).text == "Rivers run to the sea."
    for beside in ({"label": 0}, {"prompt": "p"}):
        with pytest.raises(RowError):
            read_row("sft", {"text": "t", **beside})
    assert read_row("prompt", {"text": "t"}).messages == [{"role": "user", "content": "t"}]


def megabyte() -> str:
    draw = random.Random(0)
    words = "hello there how are you today user assistant system naïve 你好 x7 1234".split()
    ends = ("\n", "\n", "\n\n", "\n  ", " ", "\t")
    parts = []
    while sum(map(len, parts)) < 10_000:
        line = " ".join(draw.choices(words, k=draw.randint(1, 14)))
        parts.append(line + draw.choice(".!?…") + draw.choice(ends))
    page = "".join(parts)
    return "".join(f"{number} {page}" for number in range(1_000_000 // len(page) + 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A megabyte prepared as one document, and short ones beside it; and the ids of them all."""
    folder = tmp_path_factory.mktemp("corpus")
    text = megabyte()
    assert len(text.encode()) > 1_000_000 > 2 * PIECE
    (folder / "book.txt").write_text(text, encoding="utf-8")
    short = [f"document number {n} " + "words " * (n % 9) for n in range(200)]
    lines = "".join(json.dumps({"text": one}) + "\n" for one in short)
    (folder / "short.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    settings = {"tokenizer": tokenizer, "template": PlainText(tokenizer), "type": "text"}
    report = prepare_dataset(
        inputs=[folder / "book.txt", folder / "short.jsonl"],
        arrow_dir=folder / "rows",
        max_length=512,
        num_bins=3,
        num_proc=2,
        show=None,
        **settings,
    )
    eos = tokenizer.eos_token_id
    documents = [[*tokenizer.encode(one), eos] for one in (text.rstrip(), *short)]
    return load_tokenized_dataset(str(folder / "rows")), documents, report


def test_each_token_of_a_megabyte_stands_in_one_row(corpus):
    dataset, documents, report = corpus
    ids = [token for row in dataset["input_ids"] for token in row]
    assert ids == [token for document in documents for token in document]
    assert report["tokens"] == len(ids) and report["supervised_tokens"] == len(ids) - len(dataset)
    assert report["traits"]["documents"] == sum(dataset["document"]) == len(documents)
    assert max(dataset["seq_length"]) == 512 and report["rows_truncated"] == 0
    assert not any("end of a response" in warning for warning in report["warnings"])


@pytest.mark.parametrize("pack", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("processes", [1, 2])
def test_each_token_is_trained_on_once_an_epoch(corpus, pack, processes):
    """In the loaders of all processes together, whatever does not fill the last step."""
    dataset, documents, _ = corpus
    batch, steps = 7, 3
    tokenizer = tiny_tokenizer()
    lengths = row_lengths(dataset)
    collate = DataCollatorForSupervisedDataset(tokenizer, 512)
    size = batch * steps * processes
    order = EpochOrder(lengths, pack_length=512 if pack else None, fill=size)
    assert (order.count(0) - size + 1) % size  # the last step is not full
    wanted = Counter(token for document in documents for token in document)
    for epoch in (0, 1):
        seen: Counter = Counter()
        learned = 0
        rows: list[int] = []
        for rank in range(processes):
            loader = GlobalBatchLoader(
                dataset,
                PackCollator(collate) if pack else collate,
                batch_size=batch,
                accumulation_steps=steps,
                dp_rank=rank,
                dp_size=processes,
                epoch_order=order,
            )
            taken = list(loader.global_batches(epoch))
            assert len(taken) == loader.count(epoch) // loader.rows_per_step
            for micro_batch in (one for step in taken for one in step):
                blank = (micro_batch["labels"] == -100).all(1)
                real = micro_batch["attention_mask"].bool() & ~blank[:, None]
                seen.update(micro_batch["input_ids"][real].tolist())
                learned += int((micro_batch["labels"] != -100).sum())
        for start in range(0, loader.count(epoch) - size + 1, size):
            rows += loader.rows_at(epoch, start)
        assert seen == wanted
        assert learned == wanted.total() - len(dataset)  # all but the first of a row
        assert sorted(rows) == list(range(len(dataset)))


def test_blank_entries_keep_their_place_when_everything_is_supervised(corpus):
    dataset, documents, _ = corpus
    tokenizer = tiny_tokenizer()
    collate = DataCollatorForSupervisedDataset(tokenizer, 512, apply_loss_mask=False)
    for pack in (None, 512):
        order = EpochOrder(row_lengths(dataset), pack_length=pack, fill=64)
        loader = GlobalBatchLoader(
            dataset, PackCollator(collate) if pack else collate, batch_size=64, epoch_order=order
        )
        batches = [batch for (batch,) in loader.global_batches(0)]
        supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        assert supervised == sum(map(len, documents)) - len(dataset)


def test_a_position_between_two_sizes_of_steps_loses_no_row(corpus):
    """A run that goes on with another batch size in mid-epoch reads the rest of it."""
    dataset = corpus[0]
    collate = DataCollatorForSupervisedDataset(tiny_tokenizer(), 512)
    seen: list[int] = []
    for start, batch in ((0, 10), (30, 7)):
        order = EpochOrder(row_lengths(dataset), fill=batch)
        loader = GlobalBatchLoader(dataset, collate, batch_size=batch, epoch_order=order)
        starts = range(start, loader.count(0) - batch + 1, batch)
        assert len(starts) == (loader.count(0) - start) // batch
        for each in starts[:3] if not start else starts:
            seen += loader.rows_at(0, each)
    assert sorted(seen) == list(range(len(dataset)))


def test_any_number_of_processes_gives_the_same_rows(corpus, tmp_path):
    (tmp_path / "book.txt").write_text(megabyte(), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tables = []
    for processes in (1, 3):
        report = prepare_dataset(
            inputs=[tmp_path / "book.txt"],
            tokenizer=tokenizer,
            template=PlainText(tokenizer),
            arrow_dir=tmp_path / str(processes),
            type="text",
            max_length=512,
            num_bins=2,
            num_proc=processes,
            show=None,
        )
        assert report["rows_read"] == report["shapes"]["document"] > 6
        tables.append(load_tokenized_dataset(str(tmp_path / str(processes))).data.table)
    assert tables[0].equals(tables[1])
    assert tables[0]["input_ids"].equals(corpus[0].data.table["input_ids"][: len(tables[0])])


def test_a_text_row_for_sft_is_that_of_source_and_target():
    from coati.dataset import setup_conversation_template

    conversation = setup_conversation_template(tiny_tokenizer(), {})
    one, other = (
        DATA_TYPES["sft"].tokenize(read_row("sft", row), conversation, 100)[0][0]
        for row in ({"text": "Hills are old."}, {"source": "", "Target": "Hills are old."})
    )
    assert one == other and one["labels"][-1] == tiny_tokenizer().eos_token_id


@pytest.mark.parametrize("kind", ["first", "always", "legacy", "tiny", "gpt2", "llama3"])
def test_pieces_of_a_document_have_its_tokens(kind, monkeypatch):
    """Wherever it is cut: those of the whole text, without word-start marks in its middle."""
    from tokenizers import Regex, pre_tokenizers

    from coati.dataset.chat.word_cache import GPT2, LLAMA3

    if kind in ("gpt2", "llama3"):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        split = pre_tokenizers.Split(Regex({"gpt2": GPT2, "llama3": LLAMA3}[kind]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        tokenizer = tiny_tokenizer() if kind == "tiny" else sentencepiece_like(kind)
    text = megabyte()[:9_000].rstrip()

    def ids(*documents) -> list[int]:
        return [
            token
            for one in documents
            for row in rows(one, 512, tokenizer)
            for token in row["input_ids"]
        ]

    whole = ids({"text": text})
    assert len(whole) > 2000
    monkeypatch.setattr(text_files, "PIECE", 700)
    monkeypatch.setattr(text_files, "_LOOKED_AT", 200)
    found = [piece for _, piece in text_files.documents_of(io.BytesIO(text.encode()), "file")]
    assert len(found) > 9
    asked = []
    of_one = ChatEncoder.encode_text
    monkeypatch.setattr(
        ChatEncoder, "encode_text", lambda *args, **more: asked.append(0) or of_one(*args, **more)
    )
    for parts in (ids(*found), ids({"text": text})):  # of a file, and of a row
        if kind in ("tiny", "gpt2", "llama3"):
            assert parts == whole
        else:  # trained without word borders, it has tokens that go over them; no mark is added
            decode = PlainText(tokenizer).encoder.decode
            assert decode(parts) == decode(whole)
    assert len(asked) > 2 * 9  # texts of either that the tokenizer was given
