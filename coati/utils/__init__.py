"""The floor of the library: knows no model, no data format, no ColossalAI."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AccumulativeMeanMeter": "meter",
        "load_json": "json_io",
        "save_json": "json_io",
        "is_rank_0": "distributed",
        "print_rank_0": "distributed",
        "all_reduce_mean": "distributed",
        "all_reduce_sum": "distributed",
    },
)
