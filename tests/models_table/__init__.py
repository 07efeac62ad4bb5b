"""docs/models.md: what each model family does under each plugin, tried with tiny random models."""

from tests.models_table.families import FAMILIES, tiny_model

__all__ = ["FAMILIES", "tiny_model"]
