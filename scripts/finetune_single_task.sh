#!/usr/bin/env bash
# Fine-tune on one task, as configs/finetune_single_task.yaml says; flags override it:
#   bash scripts/finetune_single_task.sh --model_name_or_path FOLDER --data_dir GLUE --tasks cola
# A first argument that is a .yaml or .json file takes the config's place.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
case "${1:-}" in
  *.yaml | *.yml | *.json) ;;
  *) set -- "$here/../configs/finetune_single_task.yaml" "$@" ;;
esac
exec bash "$here/finetune.sh" "$@"
