#!/usr/bin/env bash
# The tests of the library with the oldest versions that pyproject.toml allows: torch, transformers, accelerate, peft,
# trl. Needs uv and a package index; the environment is temporary. Further arguments go to pytest.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cd "$folder" # outside the checkout, whose pyproject.toml also names the newest versions
uv venv --quiet --python "${PYTHON:-3.11}" oldest
# The oldest matplotlib and the newest pyparsing warn of each other, which some tests take for errors.
uv pip install --quiet --python oldest --resolution lowest-direct -r "$root/pyproject.toml" --extra hf \
  "pyparsing>=3.2,<3.3" "pytest>=9" "pytest-xdist>=3.8" "hypothesis>=6.150"
uv pip list --quiet --python oldest | grep -E "^(torch|transformers|accelerate|peft|trl|matplotlib) "

cd "$root"
tests=(grades callback callback_kill callback_optimizers callback_rollback plain_loop compat metrics components freezing policy scales averaging rollback)
OMP_NUM_THREADS=1 "$folder/oldest/bin/python" -m pytest $(printf "tests/test_%s.py " "${tests[@]}") "$@"
