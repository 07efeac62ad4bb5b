from coati.cli.reference import PAGE, page, parsers


def test_the_page_of_flags_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make docs"


def test_the_page_names_every_flag():
    text = page()
    for parser in parsers().values():
        for name in parser.names():
            assert f"`{name}`" in text, name
    assert "`--max_length`, `--max_len`" in text
    rows = [line for line in text.splitlines() if line.startswith("| `--tp`")]
    assert rows == ["| `--tp` | N | `1` | processes that share each weight (tensor parallel) |"]
