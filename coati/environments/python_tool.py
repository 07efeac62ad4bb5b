"""Python programs that the policy writes, run where they can do no harm."""

from functools import lru_cache
from typing import Any

from coati.environments.tool_environment import ToolEnvironment, ToolError, schema

OUTPUT = 4000  # characters that the policy is shown


class PythonTool(ToolEnvironment):
    """``python(code)``: what the program prints. Each program begins anew, isolated as the reward
    ``python_tests`` isolates its own.

    Args:
        seconds: that a program may take.
        memory_mib: that it may use.

    Raises:
        ValueError: where programs cannot be isolated: they are never run bare.
    """

    tools = (
        schema(
            "python",
            "Runs a Python program and returns what it prints.",
            code="the program; print what you want to know",
        ),
    )

    def __init__(self, seconds: float = 10.0, memory_mib: int = 512) -> None:
        self.sandbox = _sandbox(seconds, memory_mib)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        from coati.rewards.sandbox.sandbox import Case

        ending = self.sandbox.run(str(arguments["code"]), [Case("stdin")])[0]
        said = ending.stdout.strip()
        if len(said) > OUTPUT:
            said = f"{said[:OUTPUT]}\n({len(said) - OUTPUT} characters more)"
        if ending.how == "exit" and ending.code == 0:
            return said or "(nothing was printed)"
        raise ToolError("\n".join(part for part in (ending.reason, said) if part))


@lru_cache(maxsize=4)
def _sandbox(seconds: float, memory_mib: int) -> Any:
    from coati.rewards.sandbox.sandbox import MIB, Limits, Sandbox

    return Sandbox(Limits(seconds=seconds, memory=memory_mib * MIB))
