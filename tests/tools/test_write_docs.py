from tools.flag_pages import DOCS, INDEX, ROOT, SCRIPTS, flag_pages, parsers_by_verb
from tools.write_docs import pages, plugin_tables, stray_pages


def test_the_generated_pages_are_current():
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make docs"
    assert stray_pages() == []


def test_the_pages_of_flags_name_every_flag():
    made = flag_pages()
    for verb, parser in parsers_by_verb().items():
        text = made[DOCS / "flags" / f"{verb}.md"]
        assert text.startswith(f"# coati {verb}\n") and parser.description in text
        for name in parser.names():
            assert f"`{name}`" in text, name
        assert f"(flags/{verb}.md)" in made[INDEX]
    sft = made[DOCS / "flags" / "sft.md"]
    assert "`--max_length`, `--max_len`" in sft
    assert "| `--tp` | N | `1` | tensor parallel size |" in sft.splitlines()


def test_commands_have_their_scripts():
    for verb, script in SCRIPTS.items():
        assert f'run("{verb}"' in (ROOT / script).read_text(encoding="utf-8"), script
    assert set(SCRIPTS) <= set(parsers_by_verb())


def test_the_plugin_table_says_what_the_checks_say():
    # columns: fp32 fp16 bf16 LoRA accumulation tp pp sp
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:10]
        for line in plugin_tables().splitlines()
        if "yes" in line
    }
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    assert cells["`gemini`"] == ["no", "yes", "yes", "no", "yes", "yes", "no", "no"]
    assert cells["`zero2`"] == ["yes", "yes", "yes", "yes", "yes", "becomes `3d`", "no", "no"]
    assert cells["`3d`"] == ["yes"] * 8


def test_the_tree_names_every_package():
    tree = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for package in ("utils/", "models/", "dataset/", "parallel/", "trainer/", "inference/", "cli/"):
        assert f"\n  {package} " in tree
