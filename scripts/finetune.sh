#!/usr/bin/env bash
# Fine-tune on several tasks at once, as configs/finetune.yaml says; flags override it:
#   bash scripts/finetune.sh --model_name_or_path FOLDER --data_dir GLUE --tasks cola sst2
# A first argument that is a .yaml or .json file takes the config's place.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mpoe="$root/.venv/bin/mpoe"
[[ -x "$mpoe" ]] || mpoe=mpoe
case "${1:-}" in
  *.yaml | *.yml | *.json) exec "$mpoe" finetune "$@" ;;
  *) exec "$mpoe" finetune "$root/configs/finetune.yaml" "$@" ;;
esac
