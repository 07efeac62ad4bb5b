"""The laws of the code as functions of a file's text: each returns what breaks it, as
``line: what``."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef

LINE = 100
FUNCTION = 60
FILE = 500
SCRIPT = 40


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def long_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > LINE:
            yield f"{number}: {len(line)} characters, at most {LINE}"


def format_comments(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if "# fmt" + ":" in line:
            yield f"{number}: switches the formatter off"


def long_files(path: Path) -> Iterator[str]:
    limit = SCRIPT if path.parent.name == "training_scripts" else FILE
    lines = path.read_text(encoding="utf-8").count("\n")
    if lines > limit:
        yield f"{lines}: {lines} lines, at most {limit}"


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines, at most {FUNCTION}"


def paired_assignments(path: Path) -> Iterator[str]:
    """``a, b = x, y``: one statement for two things, unless it exchanges or moves on the same
    names (``a, b = b, a + b``)."""
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        if any(isinstance(value, ast.Starred) for value in node.value.elts):
            continue
        targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
        if targets and not _exchanges(targets[0], node.value):
            yield f"{node.lineno}: two assignments in one; give each a line"


def _exchanges(target: ast.Tuple, value: ast.Tuple) -> bool:
    assigned = {ast.unparse(element) for element in target.elts}
    read = {
        ast.unparse(part)
        for part in ast.walk(value)
        if isinstance(part, ast.Name | ast.Attribute | ast.Subscript)
    }
    return bool(assigned & read)


def globals_by_name(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "globals()":
            yield f"{node.lineno}: looks a name up in globals(); use a registry"


def takes_namespace(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, Function):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
            if "Namespace" in kind and "SimpleNamespace" not in kind:
                yield f"{node.lineno}: {node.name} takes parsed flags; give it typed settings"


def no_docstring(path: Path) -> Iterator[str]:
    """Public functions and classes of the module, and public methods, unless a base class documents
    them or is another library's."""
    for node in tree_of(path).body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{node.lineno}: {node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if not isinstance(method, Function) or method.name.startswith("_"):
                    continue
                inherited = _of_another_library(node) or (
                    node.bases and method.name in documented_methods()
                )
                if ast.get_docstring(method) is None and not inherited:
                    yield f"{method.lineno}: {node.name}.{method.name} has no docstring"


def _of_another_library(node: ast.ClassDef) -> bool:
    ours = {"ABC", "Exception", "Generic", "NamedTuple", "Protocol", "object", *own_classes()}
    return any(ast.unparse(base).split("[")[0] not in ours for base in node.bases)


@cache
def own_classes() -> frozenset[str]:
    """Names of the library's own classes."""
    return frozenset(
        node.name
        for path in sorted((ROOT / "coati").rglob("*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    )


@cache
def documented_methods() -> frozenset[str]:
    """Names of methods that some class of the library documents."""
    return frozenset(
        method.name
        for path in sorted((ROOT / "coati").rglob("*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, Function) and ast.get_docstring(method)
    )


def imported_modules(path: Path, everywhere: bool) -> set[str]:
    """Modules of coati that importing ``path`` imports; with ``everywhere`` those inside functions
    too. Imports under TYPE_CHECKING are no imports."""
    found: set[str] = set()
    for node in _imports(tree_of(path).body, everywhere):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        else:
            for alias in node.names:
                whole = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                inside = whole.is_dir() or whole.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if inside else str(node.module))
    return {name for name in found if name.split(".")[0] == "coati"}


def _imports(body: list[ast.stmt], everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imports(node.orelse, everywhere)
        elif everywhere or not isinstance(node, Function):
            for block in ("body", "orelse", "finalbody", "handlers"):
                yield from _imports(getattr(node, block, []), everywhere)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected sets of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            start = stack.index(name)
            members = stack[start:]
            del stack[start:]
            if len(members) > 1:
                found.append(sorted(members))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def shared_blocks(paths: list[Path], lines: int = 6) -> list[str]:
    """Runs of ``lines`` lines that two files have alike; blank lines and comments do not count."""
    seen: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in paths:
        text = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        text = [line for line in text if line and not line.startswith("#")]
        for start in range(len(text) - lines + 1):
            seen[tuple(text[start : start + lines])].add(name_of(path))
    return [
        f"{' and '.join(sorted(names))}: {block[0]}"
        for block, names in seen.items()
        if len(names) > 1
    ]
