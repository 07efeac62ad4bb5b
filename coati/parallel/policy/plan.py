"""The tensor-parallel and pipeline plans of a model family. Imports neither torch nor ColossalAI.

transformers 5 keeps them in the configuration (``base_model_tp_plan``, ``base_model_pp_plan``);
:data:`TP_PLANS` and :data:`PP_PLANS` have those of families for which it keeps none.
"""

import re
from typing import Any

from coati.utils.transformers_compat import text_config

# {model_type: {module name from the base model on, "*" for an index: style}}
TP_PLANS: dict[str, dict[str, str]] = {}
# {model_type: names of the base model's children in the order in which they run}
PP_PLANS: dict[str, tuple[str, ...]] = {}


def tp_plan(config: Any) -> dict[str, str]:
    """{module name from the base model on, "*" for an index: style}; empty without a plan."""
    text = text_config(config)
    return dict(getattr(text, "base_model_tp_plan", None) or TP_PLANS.get(text.model_type) or {})


def pp_plan(config: Any) -> tuple[str, ...]:
    """Names of the base model's children in the order in which they run; empty without a plan."""
    text = text_config(config)
    return tuple(getattr(text, "base_model_pp_plan", None) or PP_PLANS.get(text.model_type) or ())


class Styles:
    """Looks up the style of a module or parameter by its name."""

    def __init__(self, plan: dict[str, str]) -> None:
        self._patterns = [
            (re.compile(re.escape(name).replace(r"\*", r"\d+")), style)
            for name, style in plan.items()
        ]

    def of(self, name: str) -> str | None:
        """The style of ``name``, or None."""
        return next((s for pattern, s in self._patterns if pattern.fullmatch(name)), None)
