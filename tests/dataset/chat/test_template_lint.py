"""What --check_template says: all at once; errors where training would be wrong, warnings where it
is handled."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import decoders

from coati.dataset.chat.conversation import setup_conversation_template
from coati.dataset.chat.template_lint import check_template
from coati.utils.logging import forget_warnings
from tests.dataset.chat import family_templates
from tests.dataset.chat.test_masks import QWEN3_LIKE, R1_LIKE
from tests.dataset.makers import CHATML as MARKERS
from tests.dataset.makers import FAMILIES, TEMPLATES, byte_level, chatml_tokenizer, family_tokenizer
from tests.tiny import CHATML

SCRIPT = Path(__file__).parents[3] / "examples" / "data_preparation_scripts" / "prepare_dataset.py"
DATA = Path(__file__).parents[2] / "data"
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
TURN = "{% for m in messages %}{{ m.role + ': ' + m.content }}"


@pytest.fixture(autouse=True)
def nothing_said_yet():
    forget_warnings()


def report_of(config, template=CHATML, names=None, specials=MARKERS, **options):
    return check_template(
        byte_level(specials, names or {"eos_token": "<|im_end|>"}, template), config, **options
    )


def test_a_good_template_in_full():
    report = report_of(None)
    assert (report.errors, report.warnings) == ([], [])
    assert report.lines() == (
        "<|im_start|>user\nProbe question number one<|im_end|>\n"
        "<|im_start|>assistant\n[[Probe answer number one<|im_end|>]]\n"
        "<|im_start|>user\nProbe question number two<|im_end|>\n"
        "<|im_start|>assistant\n[[Probe answer number two<|im_end|>]]\n\n"
        "---\nend_of_assistant '<|im_end|>', stop_ids [[256]]\nno bos, eos '<|im_end|>' (256)\n"
        "tools, calls of tools, results of tools are not written: rows that have them are dropped "
        "and counted\n"
        "no errors: this template can be trained on"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shipped_templates_have_no_errors(name):
    report = check_template(family_tokenizer(name), TEMPLATES / f"{name}.json")
    assert report.errors == [] and "[[" in report.shown
    spelled = any("ordinary ones: a model has to spell" in text for text in report.warnings)
    assert spelled == (
        name in ("THUDM_chatglm2-6b", "baichuan-inc_Baichuan2-13B-Chat", "microsoft_phi-2")
    )


# (template, fields beside it, names of tokens, kind, what is said)
CASES = {
    "doubled bos": (
        "{{ bos_token + bos_token }}" + TURN + "{{ eos_token }}{% endfor %}",
        {},
        LLAMA,
        "errors",
        "two begin-of-sequence tokens ('<s>'",
    ),
    "end token outside the mask": (
        TURN + "{{ '\n' + eos_token }}{% endfor %}",
        {"end_of_assistant": "\n"},
        LLAMA,
        "errors",
        "the end token '</s>' stands after end_of_assistant '\\n', outside the mask",
    ),
    "an end that does not follow": (
        CHATML,
        {"end_of_assistant": "</s>"},
        None,
        "errors",
        "end_of_assistant '</s>' does not follow every response; here '<|im_end|>' would do",
    ),
    "no end at all": (TURN + "{% endfor %}", {}, LLAMA, "errors", "no text follows every response"),
    "a message lost": (
        "{% for m in messages %}{{ m.role }}{% if loop.index0 != 1 %}{{ m.content }}{% endif %}{{ "
        "eos_token }}{% endfor %}",
        {},
        LLAMA,
        "errors",
        "'Probe answer number one' is in the rendered text 0 times",
    ),
    "a message repeated": (
        TURN + "{{ m.content + eos_token }}{% endfor %}",
        {},
        LLAMA,
        "errors",
        "'Probe question number one' is in the rendered text 2 times",
    ),
    "system refused, but given": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% "
        "endif %}{{ m.role + m.content + eos_token }}{% endfor %}",
        {"system_message": "S"},
        LLAMA,
        "errors",
        "refuses a system message (no system); set system_message to null",
    ),
    "everything refused": (
        "{{ raise_exception('never') }}",
        {},
        LLAMA,
        "errors",
        "refuses an ordinary dialogue (never)",
    ),
    "not Jinja": ("{% for %}", {}, LLAMA, "errors", "Jinja syntax error in line 1"),
    "system refused": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% "
        "endif %}{{ m.role + m.content + eos_token }}{% endfor %}",
        {},
        LLAMA,
        "warnings",
        "a system message is refused (no system): rows that have one are dropped",
    ),
    "system dropped": (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + m.content + eos_token }}{% "
        "endif %}{% endfor %}",
        {"system_message": "S"},
        LLAMA,
        "warnings",
        "a system message is dropped: rows that have one are trained without it, and "
        "system_message does",
    ),
    "eos missing": (
        CHATML,
        {},
        {"eos_token": "</s>"},
        "warnings",
        "the tokenizer's end-of-sequence token '</s>' is never written",
    ),
    "no eos": (CHATML, {}, {"pad_token": "<pad>"}, "warnings", "no end-of-sequence token"),
    "earlier turns rewritten": (
        "{% for m in messages %}{{ m.role + (': ' if loop.last or m.role == 'user' else '; ') }}"
        "{{ m.content + eos_token }}{% endfor %}",
        {},
        LLAMA,
        "warnings",
        "not prefix-preserving",
    ),
    "a thought dropped": (QWEN3_LIKE, {}, None, "warnings", "not prefix-preserving"),
    "the prompt opens a thought": (
        R1_LIKE,
        {},
        None,
        "warnings",
        "is not a prefix of the finished turn",
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
        {},
        LLAMA,
        "warnings",
        "there is no generation prompt: 'assistant:', which precedes responses, is added",
    ),
    "stop ids of another vocabulary": (
        CHATML,
        {"stop_ids": [[151645]]},
        None,
        "warnings",
        "stop_ids [[151645]] do not fit this tokenizer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_finding(case):
    template, fields, names, kind, said = CASES[case]
    report = report_of({"chat_template": template} | fields, names=names)
    assert any(said in text for text in getattr(report, kind)), (report.errors, report.warnings)
    assert bool(report.errors) == (kind == "errors")
    assert report.lines().endswith("would be wrong" if report.errors else "can be trained on")


def test_several_faults_are_all_named():
    """A Conversation would stop at the first of them."""
    template = "{{ bos_token + bos_token }}" + TURN + "{{ '\n' + eos_token }}{% endfor %}"
    report = report_of({"chat_template": template, "end_of_assistant": "<end>"}, names=LLAMA)
    assert [("two begin" in e, "does not follow" in e) for e in report.errors] == [
        (True, False),
        (False, True),
    ]
    assert "Probe answer number two" in report.shown and "2 errors: training" in report.lines()


def test_template_mode_refuse_makes_an_error_of_rewriting():
    report = check_template(chatml_tokenizer(QWEN3_LIKE), {}, template_mode="refuse")
    assert len(report.errors) == 1 and "not prefix-preserving" in report.errors[0]


@pytest.mark.parametrize("layout", ["template_line_markers.json", "template_stop_strings.json"])
def test_older_layouts_are_converted_with_a_message(layout, capsys):
    tokenizer = byte_level(MARKERS, LLAMA)
    config = json.loads((DATA / layout).read_text())
    if "assistant_line_end" in config:
        config["assistant_line_end"] = [tokenizer.eos_token_id]  # ids belong to a tokenizer
    assert (
        check_template(tokenizer, config).errors == [] and "older layout" in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["literal", "jinja file", "model directory"])
def test_where_a_chat_template_may_come_from(kind, tmp_path):
    chatml_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "mine.jinja").write_text(CHATML)
    values = {"literal": CHATML, "jinja file": "mine.jinja", "model directory": "model"}
    config = tmp_path / "template.json"
    config.write_text(json.dumps({"chat_template": values[kind]}))
    report = check_template(byte_level(MARKERS, {"eos_token": "<|im_end|>"}), config)
    assert report.errors == [] and report.shown.count("[[Probe answer") == 2


def test_a_name_that_is_nothing_is_an_error_with_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = check_template(chatml_tokenizer(), {"chat_template": "nobody/nothing"})
    assert (
        len(report.errors) == 1
        and "neither Jinja text, nor a file, nor a model directory" in report.errors[0]
    )


def run_script(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *words, "--check_template"])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_script_needs_a_tokenizer_alone_and_its_exit_code_tells(monkeypatch, tmp_path, capsys):
    chatml_tokenizer().save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, "--tokenizer_dir", "model") == 0
    assert "no errors: this template can be trained on" in capsys.readouterr().out
    nothing_there = "new.json"
    assert (
        run_script(
            monkeypatch, "--tokenizer_dir", "model", "--conversation_template_config", nothing_there
        )
        == 0
    )
    assert sorted(tmp_path.rglob("*")) == before
    Path("bad.json").write_text(json.dumps({"end_of_assistant": "</s>"}))
    assert (
        run_script(
            monkeypatch, "--tokenizer_dir", "model", "--conversation_template_config", "bad.json"
        )
        == 1
    )
    assert (
        "error: end_of_assistant '</s>' does not follow every response" in capsys.readouterr().out
    )


def test_markers_of_another_tokenizer_are_named_with_their_pieces(capsys):
    """The template of one family on the tokenizer of another: the pieces are bytes here."""
    config = TEMPLATES / "google_gemma-3-4b-it.json"
    tokenizer = byte_level(MARKERS, {"eos_token": "<|im_end|>"}, CHATML)
    report = check_template(tokenizer, config)
    pieces = " ".join(repr(letter) for letter in "<end_of_turn>")
    assert any(
        text.startswith("the tokenizer has no token for '<start_of_turn>' (")
        and f"'<end_of_turn>' ({pieces})" in text
        for text in report.warnings
    )
    assert any(f"a model has to spell it ({pieces}) to stop" in text for text in report.warnings)
    # 106 and 1, <end_of_turn> and <eos> of Gemma, are letters of this tokenizer.
    forget_warnings()
    capsys.readouterr()
    tokenizer.chat_template = CHATML
    template = setup_conversation_template(tokenizer, config)
    assert template.stop_ids == [tokenizer.encode("<end_of_turn>", add_special_tokens=False)]
    said = capsys.readouterr().err
    letters = [repr(tokenizer.decode([number])) for number in (106, 1)]
    assert (
        f"stop_ids of ordinary tokens of this tokenizer, 106 ({letters[0]}), 1 ({letters[1]})"
        in (said)
    )
    assert said.count("the tokenizer has no token for '<start_of_turn>'") == 1


def test_the_tokenizers_own_template_is_no_news():
    assert not any("has no token" in text for text in report_of(None).warnings)
    spelled = check_template(byte_level((), {"eos_token": "</s>"}, CHATML), None)
    assert any("no token for '<|im_start|>'" in text for text in spelled.warnings)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"THUDM_chatglm2-6b"}))
def test_each_shipped_template_writes_markers_that_its_tokenizer_has(name):
    spelled = ("baichuan-inc_Baichuan2-13B-Chat", "microsoft_phi-2")
    plain = ("llama2", "mistralai_Mixtral-8x7B-Instruct-v0.1", "tiny-llama")
    report = check_template(family_tokenizer(name), TEMPLATES / f"{name}.json")
    cut = [text for text in report.warnings if "has no token for" in text]
    assert bool(cut) == (name in (*spelled, *plain)), cut


def test_a_tokenizer_that_loses_spaces_is_the_one_at_fault():
    tokenizer = chatml_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(" ", "")]
    )
    report = check_template(tokenizer, None)
    assert report.errors[0].startswith(
        "the tokenizer makes 'Probeanswernumberone' of 'Probe answer number one'; its files are"
    )
    with pytest.raises(ValueError, match="the tokenizer makes 'Probeanswernumberone'"):
        setup_conversation_template(tokenizer, None)


def test_what_the_tokenizers_own_template_does_otherwise_is_said():
    own = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == "
        "'assistant' %}{{ m.content.split('</think>')[-1].strip() + eos_token }}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    report = report_of({"chat_template": CHATML}, own, {"eos_token": "</s>"})
    said = "the tokenizer's own chat template "
    assert [text.removeprefix(said) for text in report.notes if text.startswith(said)] == [
        "writes '<|im_start|>system\\nBe kind.<|im_end|>\\n<|im_start|>user\\n' before a first "
        "question, this one '<|im_start|>user\\n'",
        "ends responses with '</s>', this one with '<|im_end|>'",
        "drops thoughts, this one writes the thoughts of all responses",
    ]
    assert not any(said in text for text in report_of({}, own, {"eos_token": "</s>"}).notes)
    family = family_templates.tokenizer_of("qwen3")
    family.chat_template = family_templates.text_of("qwen3")
    notes = check_template(family, {"chat_template": CHATML}).notes
    assert any(
        text.endswith(
            "writes tools, their calls and their results, this one writes no tools and "
            "no calls of tools and no results of tools"
        )
        for text in notes
    )
