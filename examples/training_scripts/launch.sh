# What the training shell scripts share: source it, then `start SCRIPT FLAGS...`. Set before sourcing: STAGE, the name of
# the stage, and MOST_PROCESSES, which are started at most unless NPROC_PER_NODE says otherwise.
source "$here/least_used_gpus.sh"

PROJECT_NAME=${PROJECT_NAME:-$STAGE}
PARENT_SAVE_DIR=${PARENT_SAVE_DIR:-output}
PARENT_LOG_DIR=${PARENT_LOG_DIR:-$PARENT_SAVE_DIR/logs}
PARENT_CONFIG_FILE=${PARENT_CONFIG_FILE:-$PARENT_SAVE_DIR/configs}
PRETRAINED_MODEL_PATH=${PRETRAINED_MODEL_PATH:?the Hugging Face directory or hub name of the model to start from}
PRETRAINED_TOKENIZER_PATH=${PRETRAINED_TOKENIZER_PATH:-$PRETRAINED_MODEL_PATH}
# Prepared parts (prepare_dataset.py) or raw files; several words and wildcards are fine, spaces in names are not.
DATASET=${DATASET:?the prepared arrow part directories, or raw json/jsonl files}

# Processes on this machine: one per GPU, or a single one without a GPU.
gpus=$(gpu_count)
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus == 0 ? 1 : gpus < MOST_PROCESSES ? gpus : MOST_PROCESSES))}
HOSTFILE=${HOSTFILE:-}
MASTER_PORT=${MASTER_PORT:-29500}
if [ "$gpus" -gt 0 ]; then use_least_used_gpus "$NPROC_PER_NODE"; fi

FULL_PROJECT_NAME=$PROJECT_NAME-$(date +%Y-%m-%d-%H-%M-%S)
SAVE_DIR=${SAVE_DIR:-$PARENT_SAVE_DIR/$FULL_PROJECT_NAME}
LOG_DIR=${LOG_DIR:-$PARENT_LOG_DIR/$FULL_PROJECT_NAME}
CONFIG_FILE=${CONFIG_FILE:-$PARENT_CONFIG_FILE/$FULL_PROJECT_NAME.json}

# start SCRIPT FLAGS...: the script with model, data and output, then FLAGS.
start() {
    local script=$1 program
    shift
    # The launcher starts a bare `torchrun` on every machine, so both must be found there.
    for program in colossalai torchrun; do
        if ! command -v "$program" >/dev/null 2>&1; then
            echo "$(basename "$0"): $program is not on PATH. It is installed with the requirements: activate the" \
                "virtual environment, or put its bin directory first, e.g. PATH=\"\$PWD/.venv/bin:\$PATH\"" >&2
            exit 127
        fi
    done
    # shellcheck disable=SC2086 # DATASET and EVAL_DATASET are meant to be split into words
    exec colossalai run --nproc_per_node "$NPROC_PER_NODE" --master_port "$MASTER_PORT" \
        ${HOSTFILE:+--hostfile "$HOSTFILE"} "$here/$script" \
        --pretrain "$PRETRAINED_MODEL_PATH" \
        --tokenizer_dir "$PRETRAINED_TOKENIZER_PATH" \
        --dataset $DATASET \
        ${EVAL_DATASET:+--eval_dataset $EVAL_DATASET} \
        --save_dir "$SAVE_DIR" \
        --config_file "$CONFIG_FILE" \
        --log_dir "$LOG_DIR" \
        "$@"
}
