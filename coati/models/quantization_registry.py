"""The kinds of quantization that a user can name, and what each does to the weights."""

# --quant: what the weights become while they are loaded
QUANTS = {
    "8bit": "bitsandbytes LLM.int8(): whole numbers of 8 bits, one scale for each row",
    "4bit": "bitsandbytes NF4: 16 levels placed for normally distributed weights, one scale for 64 "
    "of them",
}
# quantize.py --method: what a directory is written with
METHODS = {
    "8bit": QUANTS["8bit"],
    "nf4": QUANTS["4bit"],
    "gptq": "LLM Compressor, GPTQ: 4 bits, a weight's error is made good in those after it; needs "
    "calibration",
    "rtn": "LLM Compressor, plain rounding to the same 4 bits: what GPTQ has to beat",
}
OF_QUANT = {"8bit": "8bit", "4bit": "nf4"}  # --quant by the method that it equals
CALIBRATED = ("gptq",)
