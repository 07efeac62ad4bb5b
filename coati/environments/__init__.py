"""Environments: what answers a policy that responds in several turns, its tools among them."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Environment": "multi_turn",
        "ToolEnvironment": "tool_environment",
        "ToolError": "tool_environment",
        "Turn": "multi_turn",
    },
)
