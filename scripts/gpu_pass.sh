#!/usr/bin/env bash
# Everything a machine with a GPU should run: see scripts/gpu_pass.py, and docs/gpu.md.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_pass.py" "$@"
