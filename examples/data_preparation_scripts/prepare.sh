# What the prepare_*_dataset.sh scripts have in common; they source it after setting TYPE and MAX_LENGTH, with "$@".
set -euo pipefail

SAVE_DIR="${SAVE_DIR:-}"
DATA_INPUT_DIRS="${DATA_INPUT_DIRS:-}"
TOKENIZER_DIR="${TOKENIZER_DIR:-}"
CONVERSATION_TEMPLATE_CONFIG="${CONVERSATION_TEMPLATE_CONFIG:-}"
NUM_SPLICED_DATASET_BINS="${NUM_SPLICED_DATASET_BINS:-10}"
PYTHON="${PYTHON:-python}"

for name in SAVE_DIR DATA_INPUT_DIRS TOKENIZER_DIR; do
    if [ -z "${!name}" ]; then
        echo "$(basename "$0"): $name is empty; set it in the environment or at the top of this file" >&2
        exit 2
    fi
done

exec "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/prepare_dataset.py" --type "$TYPE" \
    --data_input_dirs "$DATA_INPUT_DIRS" \
    --tokenizer_dir "$TOKENIZER_DIR" \
    ${CONVERSATION_TEMPLATE_CONFIG:+--conversation_template_config "$CONVERSATION_TEMPLATE_CONFIG"} \
    --data_cache_dir "$SAVE_DIR/cache" \
    --data_jsonl_output_dir "$SAVE_DIR/jsonl" \
    --data_arrow_output_dir "$SAVE_DIR/arrow" \
    --max_length "$MAX_LENGTH" \
    --num_spliced_dataset_bins "$NUM_SPLICED_DATASET_BINS" \
    "$@"
