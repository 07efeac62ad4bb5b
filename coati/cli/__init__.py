"""The composition root: flags into named values, named values into objects."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"Parser": "parser", "sft_parser": "arguments", "parse_sft": "arguments"},
)
