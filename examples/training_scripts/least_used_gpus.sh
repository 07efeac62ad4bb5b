# Sourced, not run: `use_least_used_gpus N` lets the following command see the N GPUs with the least memory in use.
# It does nothing where there is no nvidia-smi, where CUDA_VISIBLE_DEVICES is set already, or when N is empty or 0.

use_least_used_gpus() {
    local wanted=${1:-0} used chosen
    if [ "$wanted" -eq 0 ] || [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || ! command -v nvidia-smi >/dev/null 2>&1; then
        return 0
    fi
    # One line per GPU: "index, MiB in use".
    if ! used=$(nvidia-smi --query-gpu=index,memory.used --format=csv,noheader,nounits); then
        echo "least_used_gpus: nvidia-smi failed; set CUDA_VISIBLE_DEVICES yourself" >&2
        return 1
    fi
    if [ "$(printf '%s\n' "$used" | grep -c .)" -lt "$wanted" ]; then
        echo "least_used_gpus: $wanted GPUs wanted, nvidia-smi lists only: $(printf '%s' "$used" | tr '\n' ';')" >&2
        return 1
    fi
    chosen=$(printf '%s\n' "$used" | sort -t , -k 2 -n -s | head -n "$wanted" | cut -d , -f 1 | paste -s -d , -)
    # nvidia-smi numbers GPUs by their slot; CUDA numbers them by speed unless told otherwise.
    export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$chosen
    echo "least_used_gpus: CUDA_VISIBLE_DEVICES=$chosen" >&2
}

gpu_count() {
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c . || true
    else
        echo 0
    fi
}
