"""Whether the installed packages belong together. Imports none of them."""

from importlib.metadata import PackageNotFoundError, version

INSTALL_COLOSSALAI = "pip install --no-deps colossalai==0.5.0"
INSTALL_REST = "pip install -U 'torch>=2.14,<2.15' 'transformers>=5.20,<5.21' 'peft>=0.21,<0.22'"


def check_packages() -> None:
    """Raise ValueError with the command to run when ColossalAI is not there, or when torch,
    transformers and peft are partly of its own set and partly of today's, as they are when its
    metadata has pulled some of them back."""
    if _release("colossalai") is None:
        raise ValueError(
            "ColossalAI is not installed, which trains and splits the models; run: "
            f"{INSTALL_COLOSSALAI}"
        )
    found = {name: _release(name) for name in ("torch", "transformers", "peft")}
    first_of_today = {"torch": (2, 11), "transformers": (5, 0), "peft": (0, 18)}
    there = {name: release for name, release in found.items() if release}
    today = {name: _numbers(there[name]) >= first_of_today[name] for name in there}
    # torch 2.11 and later run with the older transformers and peft, too.
    if today.get("transformers") and not all(today.values()):
        old = [f"{name} {found[name]}" for name, new in today.items() if not new]
        raise ValueError(
            f"{' and '.join(old)} cannot run with transformers {found['transformers']}; "
            f"ColossalAI's own metadata asks for them. Run: {INSTALL_REST}"
        )


def require_bitsandbytes(wanted: str) -> None:
    """Raise ValueError where bitsandbytes, needed for ``wanted``, is not installed."""
    if _release("bitsandbytes") is None:
        raise ValueError(
            f"{wanted} needs the package bitsandbytes, which is not installed; run: pip install "
            "bitsandbytes (--quantize_base int8 works without it)"
        )


def releases() -> dict[str, str]:
    """The installed releases that a run depends on: torch, transformers, peft."""
    found = {name: _release(name) for name in ("torch", "transformers", "peft")}
    return {name: release for name, release in found.items() if release}


def release_of(name: str) -> tuple[int, ...] | None:
    """Major and minor number of the installed package; None where it is not installed."""
    found = _release(name)
    return None if found is None else _numbers(found)


def _release(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(release: str) -> tuple[int, ...]:
    """Major and minor number of ``release``."""
    return tuple(int(part) for part in release.split(".")[:2])
