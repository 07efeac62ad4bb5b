"""Model directories for other programs: merged, quantized, GGUF, with a model card."""
