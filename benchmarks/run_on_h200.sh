#!/usr/bin/env bash
# Run the trial on a GPU machine from a checkout, with nothing installed and no network.
# usage: [WHEELS=FOLDER] [OUT=FOLDER] [SCRIPT=true_size.py] benchmarks/run_on_h200.sh [arguments of glm4v_two_h200.py, or of SCRIPT]
# WHEELS holds what that machine's python3 lacks (msgspec, platformdirs, ...); results go to OUT (default: trial).
set -euo pipefail
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -n "${WHEELS:-}" ]]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
fi
# The folder is doctor/, the import name vlm_doctor.
ln -s "$PWD/doctor" "$site/vlm_doctor"
ln -s "$PWD/pytest_vlmgpu" "$site/pytest_vlmgpu"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OUT="${OUT:-trial}"
mkdir -p "$OUT"
python3 "benchmarks/${SCRIPT:-glm4v_two_h200.py}" --out "$OUT" "$@" 2>&1 | tee "$OUT/trial.log"
