#!/usr/bin/env bash
# Evaluate a checkpoint with lmms-eval itself, offline, on local copies of its benchmarks.
#
#   scripts/run_lmms_eval.sh --checkpoint CHECKPOINT --data_root DATA [--tasks mmstar,pope] [--limit N]
#                            [--model_args dtype=float32,prompt_style=nanovlm] [--output FOLDER] [--env ENV]
#                            [-- flags of lmms-eval]
#
# CHECKPOINT: a run folder, a checkpoint folder, or a hub id that is in the cache. DATA: as evaluate.py's --data_root,
# parquet files or folders of save_to_disk. The environment ENV (by default $LMMS_EVAL_ENV, else
# ~/.cache/nanovlm-grades/lmms-eval) is built where it is not there yet; that alone needs a network.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=${LMMS_EVAL_ENV:-$HOME/.cache/nanovlm-grades/lmms-eval}
checkpoint="" data_root="" tasks=mmstar limit="" model_args="" output=results/lmms_eval

fail() {
  echo "run_lmms_eval.sh: error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
  esac
  (($# > 1)) || fail "$1: needs a value"
  case $1 in
    --checkpoint) checkpoint=$2 ;;
    --data_root) data_root=$2 ;;
    --tasks) tasks=$2 ;;
    --limit) limit=$2 ;;
    --model_args) model_args=$2 ;;
    --output) output=$2 ;;
    --env) environment=$2 ;;
    *) fail "$1: no such flag; --help names them, and flags of lmms-eval stand after --" ;;
  esac
  shift 2
done
[[ -n $checkpoint ]] || fail "--checkpoint: is needed"
[[ -n $data_root ]] || fail "--data_root: is needed, a folder with the benchmarks' data"
[[ -d $data_root ]] || fail "--data_root $data_root: no such folder"
[[ -z $limit || $limit =~ ^[1-9][0-9]*$ ]] || fail "--limit $limit: must be a whole number >= 1"

if [[ ! -x $environment/bin/lmms-eval ]]; then
  command -v uv >/dev/null || fail "uv: is not installed; it builds the environment $environment"
  uv venv --allow-existing --python 3.11 "$environment" || fail "--env $environment: cannot be made"
  uv pip install --no-config --python "$environment" -e "$checkout/scripts/lmms_eval_plugin" ||
    fail "--env $environment: lmms-eval cannot be installed into it"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
names=$("$environment/bin/python" "$checkout/scripts/lmms_eval_local.py" --checkpoint "$checkpoint" \
  --tasks "$tasks" --data_root "$data_root" --folder "$work/tasks") || exit 2

# The program lmms-eval, not python -m lmms_eval: from the checkout that would find evaluate.py in place of the package
# evaluate.
"$environment/bin/lmms-eval" --model nanovlm_grades --model_args "pretrained=$checkpoint${model_args:+,$model_args}" \
  --include_path "$work/tasks" --tasks "$names" --batch_size auto ${limit:+--limit "$limit"} \
  --output_path "$output" --log_samples "$@"

# lmms-eval ends with 0 where an evaluation has failed.
results=$(find "$output" -name '*_results.json' -newer "$work" 2>/dev/null | sort | tail -n 1) || true  # no such folder
[[ -n $results ]] || fail "lmms-eval has written no results; the reason stands above"
echo "$results"
