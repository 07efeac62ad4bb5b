"""Exports that load their module on first use, so that importing a package stays cheap (PEP
562)."""

from collections.abc import Callable
from importlib import import_module


def lazy_exports(package: str, names: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """What a package's ``__init__`` assigns to ``__getattr__, __dir__, __all__``.

    ``names`` maps a public name to the submodule that defines it: ``{"Conversation":
    "conversation"}``. Raises ValueError for a name that is its submodule's own: once that is
    imported, the package has the module under it.
    """
    if same := [name for name, module in names.items() if name == module]:
        raise ValueError(
            f"{package} cannot export {same[0]}: its submodule of that name would take its place"
        )

    def __getattr__(name: str):
        if name in names:
            return getattr(import_module(f"{package}.{names[name]}"), name)
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module("coati.legacy.renamed").renamed_export(package, name)

    return __getattr__, lambda: sorted(names), sorted(names)
