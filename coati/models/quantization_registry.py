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
