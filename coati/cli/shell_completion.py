"""Completion scripts for shells: verbs, flags and the values of choices, else file names.

They hold everything themselves, so that completing starts no Python.
"""

from collections.abc import Mapping

from coati.cli.config_file import flags_of
from coati.cli.parser import Parser


def completion_script(shell: str, parsers: Mapping[str, Parser], about: Mapping[str, str]) -> str:
    """The script for ``shell``. ``about``: a sentence for each verb."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parsers, about)


def _choices(parser: Parser) -> dict[str, str]:
    return {
        name: " ".join(map(str, action.choices))
        for action in flags_of(parser)
        if action.choices is not None
        for name in action.option_strings
    }


def _bash(parsers: Mapping[str, Parser], about: Mapping[str, str]) -> str:
    lines = [
        "# coati completion bash > ~/.local/share/bash-completion/completions/coati",
        "_coati() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}",
        "    COMPREPLY=()",
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        COMPREPLY=($(compgen -W "{" ".join(parsers)} --help --version" -- "$current"))',
        "        return",
        "    fi",
        '    case "${COMP_WORDS[1]} $before" in',
    ]
    for verb, parser in parsers.items():
        for flag, values in _choices(parser).items():
            lines.append(
                f'        "{verb} {flag}") COMPREPLY=($(compgen -W "{values}" -- "$current")); '
                "return ;;"
            )
    lines += ["    esac", '    if [[ "$current" == -* ]]; then']
    lines.append('        case "${COMP_WORDS[1]}" in')
    for verb, parser in parsers.items():
        lines.append(
            f'            "{verb}") COMPREPLY=($(compgen -W "{" ".join(parser.names())}" -- '
            '"$current")) ;;'
        )
    # init takes the flags of the verb that it names, and verbs.
    lines += [
        "        esac",
        "        return",
        "    fi",
        '    if [ "$COMP_CWORD" -eq 2 ] && [ "${COMP_WORDS[1]}" = init ]; then',
        f'        COMPREPLY=($(compgen -W "{" ".join(parsers)}" -- "$current"))',
        "        return",
        "    fi",
        ' mapfile -t COMPREPLY < <(compgen -f -- "$current")',
        "}",
        "complete -o filenames -F _coati coati",
    ]
    return "\n".join(lines) + "\n"


def _zsh(parsers: Mapping[str, Parser], about: Mapping[str, str]) -> str:
    head = "# coati completion zsh > ~/.coati-completion.zsh, which ~/.zshrc then sources\n"
    return head + "autoload -U +X bashcompinit && bashcompinit\n" + _bash(parsers, about)


def _fish(parsers: Mapping[str, Parser], about: Mapping[str, str]) -> str:
    lines = ["# coati completion fish > ~/.config/fish/completions/coati.fish"]
    alone = "__fish_use_subcommand"
    for verb in parsers:
        lines.append(f"complete -c coati -n {alone} -f -a {verb} -d {_quoted(about[verb])}")
    for verb, parser in parsers.items():
        seen = f"'__fish_seen_subcommand_from {verb}'"
        for action in flags_of(parser):
            values = ""
            if action.choices is not None:
                values = f" -xa {_quoted(' '.join(map(str, action.choices)))}"
            elif action.nargs != "?":
                values = " -r"
            for name in action.option_strings:
                lines.append(f"complete -c coati -n {seen} -l {name.lstrip('-')}{values}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
