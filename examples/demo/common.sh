# What the demonstrations share. Sourced, with `name` set to the demonstration's own; from then on the working directory is
# the root of the repository. Gives: work (an empty folder), python, cores, template, and the functions below.
# shellcheck shell=bash disable=SC2034 # the scripts that source this use its variables

# colossalai run exports every variable to its workers in double quotes; make's own (after make demo VENV=DIR) hold text
# that a shell then takes for a substitution.
unset MAKEFLAGS MAKEOVERRIDES MFLAGS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
source examples/training_scripts/least_used_gpus.sh
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=$(command -v python || command -v python3)
started=$SECONDS

if [ -n "${DEMO_DIR:-}" ]; then
    work=$DEMO_DIR
    if [ -e "$work" ]; then
        echo "$(basename "$0"): DEMO_DIR=$work exists; name a directory that does not" >&2
        exit 2
    fi
else
    work=output/$name
    rm -rf "output/${name:?}"
fi
mkdir -p "$work"
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
template=config/conversation_template/HuggingFaceTB_SmolLM2-135M-Instruct.json

step() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - started))"; }
unpack_model() { # sets model
    step "The model: SmolLM2-135M-Instruct, unpacked into a Hugging Face directory"
    model=$("$python" examples/demo/smollm2.py)
    echo "$model"
}
prepare() { # rows of the files $2, of the type $1, with up to $3 tokens, into $work/$4
    # shellcheck disable=SC2086 # several files are several words
    "$python" examples/data_preparation_scripts/prepare_dataset.py --type "$1" --data_input_dirs $2 \
        --tokenizer_dir "$model" --conversation_template_config "$template" --max_length "$3" \
        --num_spliced_dataset_bins 1 --data_cache_dir "$work/$4/cache" \
        --data_jsonl_output_dir "$work/$4/jsonl" --data_arrow_output_dir "$work/$4/arrow"
}
quietly() { # the command from $2 on, its words kept in $work/$1 and shown if it fails
    "${@:2}" >"$work/$1" 2>&1 || { cat "$work/$1" >&2; exit 1; }
}
