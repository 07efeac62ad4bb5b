"""What ``coati VERB`` is before anything heavy is imported."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from coati.cli.parser import Parser
from coati.utils.resources import recipes

# Headings of ``coati --help``, in their order.
GROUPS = {
    "data": "Prepare data",
    "training": "Train",
    "models": "Use the result",
    "machine": "Plan and inspect",
}
CONFIGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Args:
        group: its heading in ``coati --help``, a key of :data:`GROUPS`.
        parser: makes the parser of its flags.
        parse: ``parse(argv, prog=...)`` gives the checked settings; those with flags of earlier
            releases take ``older`` too.
        main: ``"module:function"``, which is imported to run with the settings.
        subject: the flag that words before the first flag stand for (``coati chat MODEL``); a
            YAML file there is ``--config``.
        processes: whether several processes may run it together (``--nproc``).
    """

    group: str
    parser: Callable[[], Parser]
    parse: Callable[..., Any]
    main: str
    subject: str | None = None
    processes: bool = False

    def words(self, argv: list[str]) -> list[str]:
        """``argv`` with the flags that its leading bare words stand for. Exits with code 2 where
        the flag is there too."""
        count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
        bare = argv[:count]
        rest = argv[count:]
        configs = CONFIGS if self.subject else (*CONFIGS, ".json")
        is_recipe = self.subject is None and bare and bare[0] in recipes()
        if bare and (is_recipe or bare[0].lower().endswith(configs)):
            rest = [*rest, "--config", bare.pop(0)]
        if not bare:
            return rest
        if self.subject is None:
            return [*bare, *rest]  # refused by the parser
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        if self.subject in [f"--{flag[2:].replace('-', '_')}" for flag in flags]:
            self.parser().error(
                f"{bare[0]} stands for {self.subject} {bare[0]}, and {self.subject} is given too; "
                "give one of the two"
            )
        return [self.subject, *bare, *rest]

    def function(self) -> Callable[..., None]:
        """What runs it. Imports its module and all that it needs."""
        module, _, name = self.main.partition(":")
        return getattr(import_module(module), name)
