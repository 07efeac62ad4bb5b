"""Everything a user may give prepare_dataset.py by mistake: one message that names the place, no
traceback, no output.

Each case is a call of the script itself. The files are in tests/data/malformed; what is not text is
made here.
"""

import gzip
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dataset.makers import LLAMA, byte_level, chatml_tokenizer

ROOT = Path(__file__).parents[3]
HERE = ROOT / "tests" / "data" / "malformed"
SCRIPT = ROOT / "examples" / "data_preparation_scripts" / "prepare_dataset.py"
GOOD = (
    '{"messages": [{"from": "human", "content": "Hello"}, '
    '{"from": "assistant", "content": "Hi there"}]}\n'
)
SFT_KEYS = (
    "expected messages / a list of messages / conversations / instruction, output / source, Target"
)


@dataclass
class Case:
    """``data``: a file of tests/data/malformed, or what makes one in a folder; ``said``: all that
    the message must hold, {at} being the data's path; ``flags`` may name {folder}, the case's own,
    and {here}, that of the files."""

    data: str | Callable[[Path], Path]
    said: tuple[str, ...]
    type: str = "sft"
    flags: tuple[str, ...] = ()
    code: int = 1
    tokenizer: str = "chatml"


def made(name: str, content: bytes | str) -> Callable[[Path], Path]:
    """A file of that name and content."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return make


def table(name: str, columns: dict, cut: int | None = None) -> Callable[[Path], Path]:
    """A parquet file, of which only the first ``cut`` bytes may be there."""

    def make(folder: Path) -> Path:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), folder / name)
        if cut is not None:
            os.truncate(folder / name, cut)
        return folder / name

    return make


def folder_of(**files: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "data").mkdir()
        for name, content in files.items():
            (folder / "data" / name.replace("__", ".")).write_text(content)
        return folder / "data"

    return make


# Python 3.13 names the comma, earlier ones the brace after it.
COMMA = (
    ("Illegal trailing comma", "at column 99")
    if sys.version_info >= (3, 13)
    else ("Expecting property name", "at column 100")
)


def row(name: str, *said: str, type: str = "sft", line: int = 1, **more) -> Case:
    """A case whose message stands beside the file and line of the row."""
    return Case(name, ("{at}:" + f"{line}: " + said[0], *said[1:]), type=type, **more)


def template(name: str, *said: str, **more) -> Case:
    flags = ("--conversation_template_config", "{here}/" + name)
    return Case("third_line.jsonl", ("{here}/" + name, *said), flags=flags, **more)


def flag(said: str, *flags: str, code: int = 2, **more) -> Case:
    return Case("third_line.jsonl", (said,), flags=flags, code=code, **more)


NOT_JSON = {
    "a cut line": row("cut_line.jsonl", "Unterminated string", "the line is not JSON"),
    "Python instead of JSON": row(
        "single_quotes.jsonl", "Expecting property name enclosed in double quotes at column 2"
    ),
    "a comma too many": row("trailing_comma.jsonl", *COMMA),
    "two objects in a line": row("two_objects_in_a_line.jsonl", "Extra data at column 100"),
    "an object over several lines": row(
        "pretty_printed.json", "the object goes on in the next line", "one array"
    ),
    "a comment": row("comment.jsonl", "Expecting value at column 1"),
    "Markdown": row("markdown.jsonl", "Expecting value at column 1"),
    "Latin-1": row("latin_1.jsonl", "not UTF-8 text (byte 51)"),
    "UTF-16": Case("utf_16.jsonl", ("{at}: is UTF-16 text, expected UTF-8", "iconv")),
    "UTF-16 without its mark": row(
        "utf_16_no_mark.jsonl", "NUL bytes, the first at column 2: UTF-16 text"
    ),
    "NUL bytes alone": row("nul_bytes.jsonl", "NUL bytes, the first at column 1"),
    "a NUL byte in a text": row("nul_inside.jsonl", "NUL bytes, the first at column 93"),
    "a key twice": row("duplicate_key.jsonl", "the key 'messages' occurs twice in one object"),
    "a number of 5000 digits": row("long_number.jsonl", "Exceeds the limit (4300 digits)"),
    "NaN": row("not_a_number.jsonl", "messages must be a list of messages, found float"),
    "half of a character": row(
        "half_a_surrogate.jsonl", r"half of a character ('\ud83d') without the other"
    ),
    "brackets nested too deep": row(
        made("deep.jsonl", '{"a":' * 100_000 + "\n"), "maximum recursion depth"
    ),
    "a line of eight megabytes": row(
        made("huge.jsonl", '{"messages": "' + "x" * 2**23), "Unterminated string"
    ),
    "the third line": row(
        "third_line.jsonl", "the object goes on in the next line", line=3, flags=("--strict",)
    ),
}
ARRAYS_AND_FILES = {
    "an array without end": row(
        "open_array.json", "the brackets opened here are not closed", line=3, flags=("--strict",)
    ),
    "an array of numbers": row("array_of_numbers.json", SFT_KEYS, "found int"),
    "an array without comma": row("array_without_comma.json", "Extra data at column 17", line=2),
    "an array inside an object": row(
        "array_in_object.json", SFT_KEYS, "found data", "data holds a list of rows"
    ),
    "lists in lists": row("list_of_lists.jsonl", SFT_KEYS, "found list"),
    "an empty array": Case(
        "empty_array.json", ("{at}: no rows found; expected one JSON object per line",)
    ),
    "an empty object": row("empty_object.jsonl", SFT_KEYS, "found no key"),
    "blank lines alone": Case("only_blanks.jsonl", ("{at}: no rows found",)),
    "an empty file": Case("empty.jsonl", ("{at}: no rows found",)),
    "null": row("null.jsonl", SFT_KEYS, "found NoneType"),
    "a short record": row(
        "short_record.csv", "1 fields under 3 columns (instruction, input, output)", line=2
    ),
    "a long record": row(
        "long_record.csv", "3 fields under 2 columns", "quote fields with commas", line=2
    ),
    "a quote that is not closed": row("open_quote.csv", "unexpected end of data", line=2),
    "columns of something else": row("other_header.csv", SFT_KEYS, "found title, body", line=2),
    "a header alone": Case("only_header.csv", ("{at}: no rows found", "records under a header")),
    "csv in Latin-1": row("latin_1.csv", "not UTF-8 text", line=2),
    "lines of text for sft": row(
        "questions.txt", "found a text: plain rows, for --type prompt, not sft"
    ),
    "a cut parquet file": Case(
        table("cut.parquet", {"messages": ["x"] * 9}, cut=100),
        ("{at}: not a readable parquet file",),
    ),
    "text named parquet": Case(made("text.parquet", GOOD), ("{at}: not a readable parquet file",)),
    "parquet of other columns": row(
        table("other.parquet", {"title": ["a", "b"]}), SFT_KEYS, "found title"
    ),
    "parquet with a null": row(
        table("null.parquet", {"instruction": ["a"], "output": [None]}),
        "found instruction, output (null)",
    ),
    "parquet with bytes": row(
        table("bytes.parquet", {"instruction": ["a"], "output": [b"\xff"]}),
        "output holds bytes instead of a string",
    ),
    "a cut gzip file": Case(
        made("cut.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:40]),
        ("{at}: damaged or not a gzip",),
    ),
    "text named gzip": Case(
        made("text.jsonl.gz", GOOD), ("{at}: damaged or not a gzip file", "again")
    ),
    "an unknown kind of file": Case(
        made("rows.xlsx", b"PK"), ("{at}: unknown kind of data file", ".jsonl", ".parquet")
    ),
    "a file that is not there": Case(
        lambda folder: folder / "absent.jsonl", ("{at}: there is no such file",)
    ),
    "an empty folder": Case(folder_of(), ("{at}: the folder holds no data file", "found nothing")),
    "a folder of something else": Case(
        folder_of(a__md="x", b__pdf="x"), ("{at}: the folder holds no data", "a.md, b.pdf")
    ),
    "what is prepared already": Case(
        folder_of(preparation__json="{}"), ("{at}: is prepared already", "--dataset")
    ),
    "a saved data set without its state": Case(
        folder_of(state__json="{"), ("state.json:1:", "not valid JSON")
    ),
    "a saved data set without its files": Case(
        folder_of(state__json="{}"), ("state.json", "_data_files")
    ),
}
SFT = {
    "a misspelled column": row(
        "misspelled_column.jsonl",
        SFT_KEYS,
        "found mesages; nearest is",
        "(messages)",
        "needs messages",
    ),
    "other columns": row("other_columns.jsonl", SFT_KEYS, "found title, body"),
    "an instruction without output": row(
        "missing_output.jsonl", "found instruction, input: alpaca rows", "for --type prompt"
    ),
    "an instruction that is a list": row(
        "instruction_list.jsonl", "instruction holds a list with str in it"
    ),
    "messages as text": row(
        "messages_text.jsonl", "messages must be a list of messages, found str"
    ),
    "a message as text": row("message_text.jsonl", "message 0 must be an object, found str"),
    "no content": row(
        "without_content.jsonl", "message 0 lacks content (or value), found from, text"
    ),
    "no role": row("without_role.jsonl", "message 0 lacks from (or role), found speaker, content"),
    "an unknown role": row(
        "unknown_role.jsonl", "message 0 is from 'narrator'; known roles: user, human"
    ),
    "a number as role": row("role_number.jsonl", "message 0 is from 1"),
    "a tool": row("tool_role.jsonl", "message 1 is from tool, expected assistant: no call"),
    "a call of a tool": row("tool_call.jsonl", "message 1 calls a function without a name"),
    "two questions": row("two_questions.jsonl", "message 1 is from user, expected assistant"),
    "an answer first": row("answer_first.jsonl", "message 0 is from assistant, expected user"),
    "a late system message": row("late_system.jsonl", "message 2 is from system, expected user"),
    "a number as content": row("content_number.jsonl", "message 1 holds int instead of a string"),
    "null as content": row("content_null.jsonl", "message 1 lacks content (or value)"),
    "a picture": row("content_picture.jsonl", "message 0 holds a list with image_url in it"),
    "no messages": row("no_messages.jsonl", "the list of messages is empty"),
    "a system message alone": row("only_system.jsonl", "found only system"),
    "no answer": row("no_answer.jsonl", "found only user"),
    "an empty answer": row("empty_answer.jsonl", "message 1 is empty"),
    "a pair": row(
        "equal_answers.jsonl",
        "found context, chosen, rejected: preference rows, for --type preference or prompt, not "
        "sft",
    ),
    "a judged answer": row(
        "label_word.jsonl", "found prompt, completion, label: kto rows, for --type kto", "not sft"
    ),
    "too long for max_length": row(
        "third_line.jsonl",
        "17 tokens are needed, max_length is 9",
        line=2,
        flags=("--max_length", "9", "--max_bad_ratio", "1"),
    ),
    "another shape than --format": row(
        "no_answer.jsonl",
        "expected conversations",
        "(--format sharegpt), found messages",
        flags=("--format", "sharegpt"),
    ),
}
PAIRS = {
    "no rejected": row(
        "no_rejected.jsonl",
        "expected context, chosen, rejected",
        "which needs rejected",
        type="preference",
    ),
    "equal answers": row("equal_answers.jsonl", "both are 'Much'", type="preference"),
    "a context that ends with an answer": row(
        "context_ends_with_answer.jsonl", "found user, assistant", type="preference"
    ),
    "chosen from the user": row(
        "chosen_from_user.jsonl", "chosen: message 0 is from user", type="preference"
    ),
    "a number as chosen": row(
        "chosen_number.jsonl", "chosen must be a list of messages, found int", type="preference"
    ),
    "chosen without message": row("chosen_empty.jsonl", "chosen is empty", type="preference"),
    "a blank chosen": row("chosen_blank.jsonl", "chosen: message 0 is empty", type="preference"),
    "a word as margin": row(
        "margin_text.jsonl", "margin is 'wide', expected a number", type="preference"
    ),
    "NaN as margin": row("margin_nan.jsonl", "margin is nan, expected a number", type="preference"),
    "texts that are no dialogues": row(
        "not_a_dialogue.jsonl", "chosen is a text without its prompt", type="preference"
    ),
    "dialogues without a common question": row(
        "nothing_shared.jsonl", "chosen and rejected begin differently", type="preference"
    ),
    "a conversation": row(
        "no_answer.jsonl",
        "found messages: messages rows, for --type sft or prompt, not preference",
        type="preference",
    ),
    "a pair longer than max_length": row(
        "context_and_pair.jsonl",
        "chosen: 27 tokens are needed, max_length is 9",
        type="preference",
        flags=("--max_length", "9"),
    ),
}
JUDGED_AND_PROMPTS = {
    "no label": row("no_label.jsonl", "found prompt, completion", "not kto", "label", type="kto"),
    "a word as label": row(
        "label_word.jsonl", "label is 'maybe', expected true or false", type="kto"
    ),
    "half a label": row("label_number.jsonl", "label is 0.5, expected true or false", type="kto"),
    "a list as label": row(
        "label_list.jsonl", "label is [True], expected true or false", type="kto"
    ),
    "two completions": row(
        "two_completions.jsonl", "completion must be one message of the assistant", type="kto"
    ),
    "an empty completion": row("completion_empty.jsonl", "completion is empty", type="kto"),
    "a prompt that ends with an answer": row(
        "prompt_ends_with_answer.jsonl", "found user, assistant", type="kto"
    ),
    "a conversation to be judged": row(
        "no_answer.jsonl",
        "found messages: messages rows, for --type sft or prompt, not kto",
        type="kto",
    ),
    "a number as prompt": row(
        "prompt_number.jsonl", "prompt must be a list of messages, found int", type="prompt"
    ),
    "a blank prompt": row(
        "prompt_blank.jsonl", "message 0, the last of the user, is blank", type="prompt"
    ),
    "answers alone": row(
        "only_answers.jsonl", "message 0 is from assistant, expected user", type="prompt"
    ),
}
TEMPLATES = {
    "a syntax error": template("template_syntax.json", "Jinja syntax error in line 3", "endfr"),
    "an end marker that never comes": template(
        "template_no_marker.json", "end_of_assistant '<|end|>' does not follow"
    ),
    "a template without contents": template(
        "template_no_content.json", "should occur once in the rendered text"
    ),
    "a name that messages lack": template(
        "template_unknown_name.json", "refuses an ordinary dialogue", "'text'"
    ),
    "a template that refuses": template(
        "template_raises.json", "refuses an ordinary dialogue (system turns only)"
    ),
    "a misspelled field": template(
        "template_misspelled_field.json", "'end_of_asistant'; did you mean 'end_of_assistant'?"
    ),
    "an object as stop_ids": template(
        "template_stop_ids.json", "stop_ids must be a list of token sequences"
    ),
    "a number as system message": template(
        "template_system_number.json", "system_message must be a string or null"
    ),
    "a template file that is not there": template(
        "template_no_file.json", "there is no file missing_template.jinja"
    ),
    "an array as template": template(
        "template_array.json", "expected a JSON object with the fields chat_template"
    ),
    "a template that is not JSON": template("template_broken.json:2:1", "not valid JSON"),
    "bos twice": template("template_two_bos.json", "begin-of-sequence", tokenizer="llama"),
    "no template at all": Case(
        "third_line.jsonl", ("has no chat template; set chat_template",), tokenizer="llama"
    ),
}
TEMPLATES["a template that is not JSON"].flags = (
    "--conversation_template_config",
    "{here}/template_broken.json",
)
FLAGS = {
    "an unknown type": Case(
        "third_line.jsonl", ("argument --type", "'poem'", "'kto'"), type="poem", code=2
    ),
    "a format of another type": flag(
        "--format hh_rlhf is for --type preference", "--format", "hh_rlhf"
    ),
    "an unknown format": flag("--format", "--format", "yaml"),
    "a misspelled flag": flag("--num_spliced_dataset_bins", "--num_spliced_datset_bins", "3"),
    "max_length 1": flag("--max_length", "--max_length", "1"),
    "a word as max_length": flag("--max_length", "--max_length", "long"),
    "no bins": flag("--num_spliced_dataset_bins", "--num_spliced_dataset_bins", "0"),
    "an empty sample": flag(
        "--num_samples_per_datafile 0 selects no rows", "--num_samples_per_datafile", "0"
    ),
    "a negative seed": flag("--seed", "--seed", "-1"),
    "a bad ratio above one": flag("--max_bad_ratio", "--max_bad_ratio", "1.5"),
    "a similarity of one": flag("--near_duplicates", "--near_duplicates", "1"),
    "an evaluation share of one": flag("--eval_ratio", "--eval_ratio", "1"),
    "evaluation rows from two places": flag(
        "give one", "--eval_ratio", "0.1", "--eval_input_dirs", "{here}/null.jsonl"
    ),
    "overlap with nothing": flag(
        "--drop_eval_overlap needs evaluation rows", "--drop_eval_overlap"
    ),
    "bounds that exclude all": flag(
        "--max_answer_chars 5 is below", "--max_answer_chars", "5", "--min_answer_chars", "9"
    ),
    "a benchmark that is not there": flag(
        "absent.jsonl: there is no such", "--benchmark_files", "absent.jsonl", code=1
    ),
    "evaluation files without rows": flag(
        "empty.jsonl: no rows found for evaluation",
        "--eval_input_dirs",
        "{here}/empty.jsonl",
        code=1,
    ),
    "too many malformed rows": flag(
        "at most a share of 0.3 may be. Most", "--max_bad_ratio", "0.3", code=1
    ),
    "no tokenizer there": flag("no_tokenizer", "--tokenizer_dir", "{folder}/no_tokenizer", code=1),
    "an output that exists": flag(
        "exists already; name another", "--data_arrow_output_dir", "{here}", code=1
    ),
    "one folder for both outputs": flag(
        "name two folders", "--data_arrow_output_dir", "{folder}/jsonl", code=1
    ),
    "an output inside a file": flag(
        "third_line.jsonl", "--data_arrow_output_dir", "{here}/third_line.jsonl/x", code=1
    ),
    "scratch space inside a file": flag(
        "third_line.jsonl", "--data_cache_dir", "{here}/third_line.jsonl/x", code=1
    ),
}
CASES = NOT_JSON | ARRAYS_AND_FILES | SFT | PAIRS | JUDGED_AND_PROMPTS | TEMPLATES | FLAGS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    chatml_tokenizer().save_pretrained(folder / "chatml")
    byte_level(names=LLAMA).save_pretrained(folder / "llama")
    return folder


def command(case: Case, folder: Path, tokenizers: Path) -> tuple[list[str], Path]:
    """The words behind ``prepare_dataset.py``, and the data's path."""
    data = case.data(folder) if callable(case.data) else HERE / case.data
    flags = [word.format(folder=folder, here=HERE) for word in case.flags]
    words = [
        "--type",
        case.type,
        "--data_input_dirs",
        str(data),
        "--tokenizer_dir",
        str(tokenizers / case.tokenizer),
        "--data_cache_dir",
        str(folder / "cache"),
        "--data_jsonl_output_dir",
        str(folder / "jsonl"),
        "--data_arrow_output_dir",
        str(folder / "arrow"),
        "--num_proc",
        "1",
        "--num_spliced_dataset_bins",
        "1",
        *flags,
    ]
    return words, data


def check(case: Case, data: Path, folder: Path, code: int, said: str) -> None:
    assert code == case.code, said
    for part in case.said:
        assert part.replace("{at}", str(data)).replace("{here}", str(HERE)) in said, said
    assert "Traceback" not in said and "error: " in said
    left = [path.name for path in folder.iterdir() if path.name not in ("cache", data.name)]
    assert not left and not list((folder / "cache").glob("*")), left


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(name, tmp_path, tokenizers, monkeypatch, capsys):
    case = CASES[name]
    words, data = command(case, tmp_path, tokenizers)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().err + (ended.value.code if isinstance(ended.value.code, str) else "")
    check(case, data, tmp_path, 1 if isinstance(ended.value.code, str) else ended.value.code, said)


@pytest.mark.parametrize("name", ["a cut line", "max_length 1"])
def test_the_command_itself(name, tmp_path, tokenizers):
    case = CASES[name]
    words, data = command(case, tmp_path, tokenizers)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment,
    )
    check(case, data, tmp_path, done.returncode, done.stderr)
    assert done.stdout == ""


def test_every_file_is_used_and_there_are_sixty_cases():
    named = {case.data for case in CASES.values() if isinstance(case.data, str)}
    named |= {
        word.split("/")[1] for case in CASES.values() for word in case.flags if "{here}/" in word
    }
    assert {path.name for path in HERE.iterdir()} == named and len(CASES) > 60


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.encode().replace(b"\n", b"\r\n"),
        b"\n\n  \n" + GOOD.encode() + b"\n\n",
        GOOD.encode().rstrip(),
        b"\xef\xbb\xbf[" + GOOD.encode() + b"]",
        GOOD.replace("human", "HUMAN").encode(),
        GOOD.replace("Hello", "\\ud83d\\ude00").encode(),
        GOOD.replace("Hello", "\\u0000\\u001b").encode(),
    ],
)
def test_what_is_odd_but_good_is_read(content, tmp_path, tokenizers, monkeypatch, capsys):
    words, _ = command(Case(made("rows.jsonl", content), ()), tmp_path, tokenizers)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "rows read 1, kept 1" in capsys.readouterr().out


def test_random_damage_is_always_named():
    """Bytes changed, lost and put in at random, in rows of every sample: each is read, or refused
    with a reason."""
    from coati.dataset.data_types import DATA_TYPES
    from coati.dataset.rows.formats import read_row
    from coati.dataset.rows.input_files import decode
    from coati.dataset.rows.row_errors import REASONS, RowError

    chance = random.Random(0)
    samples = [
        line
        for file in sorted((ROOT / "examples" / "data").rglob("*.jsonl"))
        for line in file.open("rb")
    ]
    pieces = [b'"', b"{", b"[", b"\\", b"\\ud83d", b",", b"\0", b"}", b"null", b"\xff"]
    refused = 0
    for _ in range(3000):
        row = bytearray(chance.choice(samples))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(row))
            row[place : place + chance.choice([0, 0, 1, 9])] = chance.choice(pieces)
        try:
            read_row(chance.choice(list(DATA_TYPES)), decode(bytes(row)))
        except RowError as error:
            assert error.reason in REASONS and error.detail
            str(error).encode("utf-8")
            refused += 1
    assert refused > 2000
