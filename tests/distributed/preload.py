"""Imported once by the server from which the workers of a test session are forked: what takes
seconds to import."""

import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from coati.parallel.compat.import_colossalai import import_colossalai

import_colossalai()
import colossalai.legacy  # noqa: E402, F401
