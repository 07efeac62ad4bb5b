from tools.write_docs import PAGE, page, pages, parsers, plugin_tables


def test_the_generated_pages_are_current():
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make docs"


def test_the_page_of_flags_names_every_flag():
    text = page()
    for parser in parsers().values():
        for name in parser.names():
            assert f"`{name}`" in text, name
    assert "`--max_length`, `--max_len`" in text
    rows = [line for line in text.splitlines() if line.startswith("| `--tp`")]
    assert set(rows) == {"| `--tp` | N | `1` | tensor parallel size |"}


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
    tree = (PAGE.parent / "architecture.md").read_text(encoding="utf-8")
    for package in ("utils/", "models/", "dataset/", "parallel/", "trainer/", "inference/", "cli/"):
        assert f"\n  {package} " in tree
