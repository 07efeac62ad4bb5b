"""Quantization methods by name; imports nothing, for the parsers."""

# --quant: what the weights become while they are loaded
QUANTS = {
    "8bit": "bitsandbytes LLM.int8(): 8-bit integers, one scale per row",
    "4bit": "bitsandbytes NF4: 16 levels for normally distributed weights, one scale per 64",
}
# coati quantize --method: what a directory is written with
METHODS = {
    "8bit": QUANTS["8bit"],
    "nf4": QUANTS["4bit"],
    "gptq": "LLM Compressor, GPTQ: 4 bits with error compensation; needs calibration data",
    "rtn": "LLM Compressor, round-to-nearest: 4 bits, the baseline of GPTQ",
}
METHOD_OF_QUANT = {"8bit": "8bit", "4bit": "nf4"}  # --quant -> --method
CALIBRATED = ("gptq",)  # need calibration data
# --quantize_base: how the frozen base below LoRA adapters is stored
BASES = {
    "nf4": "4 bits, 16 levels for normally distributed weights, double quantization (QLoRA)",
    "int8": "8 bits, one scale per row",
}
BLOCK = 64  # weights of nf4 that share a scale
NESTED_BLOCK = 256  # scales that share one in turn


def stored_bytes(kind: str, rows: int, columns: int) -> float:
    """What a weight (rows, columns) takes as ``kind``, a key of BASES."""
    if kind == "int8":
        return rows * columns + 4.0 * rows
    blocks = -(-rows * columns // BLOCK)
    return rows * columns / 2 + blocks + 4.0 * (-(-blocks // NESTED_BLOCK) + 1)
