#!/usr/bin/env bash
# Train a new small GPT-2 on a corpus, then continue three times for the same tokens: dense, and as the paper's +Switch
# and +MPOE. Each model writes sentences, which are scored against the test part. One table shows all results.
#
# Usage: bash examples/gpt2_variants.sh CORPUS OUT [STEPS] [MORE_STEPS] [FLAG ...]
# CORPUS is a folder with train.txt and test.txt, a sentence a line. Flags are those of mpoe finetune, for all trainings.
# MODEL=gpt2 (a hub's name, or a folder) in the environment takes the place of the new GPT-2.
set -euo pipefail
(($# >= 2)) || { sed -n 's/^# \?//; 2,8p' "$0" >&2; exit 2; }
corpus=$1 out=$2 steps=${3:-600} more=${4:-300}
shift $(($# < 4 ? $# : 4))
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="$root/.venv/bin/"
[[ -x "${bin}mpoe" ]] || bin=

train() { # NAME BASE STEPS LEARNING_RATE FLAG ...
  local name=$1 base=$2 steps=$3 rate=$4
  shift 4
  "${bin}mpoe" finetune --objective causal-lm --corpus "$corpus" --model_name_or_path "$base" --output_dir "$out/$name" \
    --max_steps "$steps" --learning_rate "$rate" --block_size 128 --per_device_train_batch_size 16 \
    --eval_strategy no --save_strategy no "$@"
}

if [[ -z "${MODEL:-}" ]]; then
  [[ -f "$out/new/config.json" ]] || "${bin}python" "$root/examples/new_gpt2.py" "$corpus" "$out/new" --n_positions 128
  train base "$out/new" "$steps" 1e-3 --num_experts 1 --mpo_layers nompo "$@"
  MODEL=$out/base
fi
train dense "$MODEL" "$more" 3e-4 --num_experts 1 --mpo_layers nompo "$@"
train switch "$MODEL" "$more" 3e-4 --num_experts 8 --mpo_layers nompo --balancing loss "$@"
train mpoe "$MODEL" "$more" 3e-4 --num_experts 8 --layout balanced --balancing loss --gradient_mask_prob 0.5 "$@"
for name in dense switch mpoe; do
  [[ -f "$out/$name/scores.json" ]] || "${bin}mpoe" generate "$out/$name" $'\n' --num_samples 500 --max_new_tokens 60 \
    --do_sample --top_k 0 --stop_at_newline --batch_size 50 --reference "$corpus/test.txt" \
    --output "$out/$name/samples.txt" --metrics "$out/$name/scores.json"
done
"${bin}mpoe" compare "$out/dense" "$out/switch" "$out/mpoe"
