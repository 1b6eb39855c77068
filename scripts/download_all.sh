#!/usr/bin/env bash
# Every data set of the three stages, into OUTPUT_DIR; more flags are those of download_datasets.py:
#     OUTPUT_DIR=/data/molmo2 scripts/download_all.sh --max_images 20000
# What fails is named and does not stop the others.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/download_datasets.py" --all --skip_errors \
    --output_dir "${OUTPUT_DIR:-./data/molmo2_datasets}" "$@"
