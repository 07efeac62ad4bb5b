#!/usr/bin/env bash
# Supervised fine-tuning with ColossalAI's launcher. Everything below can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_sft.sh --max_steps 100
# Further flags are handed on to train_sft.py (python train_sft.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/least_used_gpus.sh"

PROJECT_NAME=${PROJECT_NAME:-sft}
PARENT_SAVE_DIR=${PARENT_SAVE_DIR:-output}
PARENT_LOG_DIR=${PARENT_LOG_DIR:-$PARENT_SAVE_DIR/logs}
PARENT_CONFIG_FILE=${PARENT_CONFIG_FILE:-$PARENT_SAVE_DIR/configs}
PRETRAINED_MODEL_PATH=${PRETRAINED_MODEL_PATH:?the Hugging Face directory or hub name of the model to start from}
PRETRAINED_TOKENIZER_PATH=${PRETRAINED_TOKENIZER_PATH:-$PRETRAINED_MODEL_PATH}
# Prepared parts (prepare_sft_dataset.sh) or raw files; several words and wildcards are fine, spaces in names are not.
DATASET=${DATASET:?the prepared arrow part directories, or raw json/jsonl files}

# Processes on this machine: one per GPU, at most 4, or a single one without a GPU.
gpus=$(gpu_count)
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus == 0 ? 1 : gpus < 4 ? gpus : 4))}
HOSTFILE=${HOSTFILE:-}
MASTER_PORT=${MASTER_PORT:-29500}
if [ "$gpus" -gt 0 ]; then use_least_used_gpus "$NPROC_PER_NODE"; fi

FULL_PROJECT_NAME=$PROJECT_NAME-$(date +%Y-%m-%d-%H-%M-%S)
SAVE_DIR=${SAVE_DIR:-$PARENT_SAVE_DIR/$FULL_PROJECT_NAME}
LOG_DIR=${LOG_DIR:-$PARENT_LOG_DIR/$FULL_PROJECT_NAME}
CONFIG_FILE=${CONFIG_FILE:-$PARENT_CONFIG_FILE/$FULL_PROJECT_NAME.json}

# The launcher starts a bare `torchrun` on every machine, so both must be found there.
for program in colossalai torchrun; do
    if ! command -v "$program" >/dev/null 2>&1; then
        echo "train_sft.sh: $program is not on PATH. It is installed with the requirements: activate the virtual" \
            "environment, or put its bin directory first, e.g. PATH=\"\$PWD/.venv/bin:\$PATH\"" >&2
        exit 127
    fi
done

# shellcheck disable=SC2086 # DATASET is meant to be split into words
exec colossalai run --nproc_per_node "$NPROC_PER_NODE" --master_port "$MASTER_PORT" \
    ${HOSTFILE:+--hostfile "$HOSTFILE"} "$here/train_sft.py" \
    --pretrain "$PRETRAINED_MODEL_PATH" \
    --tokenizer_dir "$PRETRAINED_TOKENIZER_PATH" \
    --dataset $DATASET \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-4096}" \
    --lr "${LR:-5e-5}" \
    --save_interval "${SAVE_INTERVAL:-2000}" \
    --save_dir "$SAVE_DIR" \
    --config_file "$CONFIG_FILE" \
    --log_dir "$LOG_DIR" \
    "$@"
