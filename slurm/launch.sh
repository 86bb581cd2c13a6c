#!/usr/bin/env bash
# launch.sh CLONE ARGUMENT...: pipeline/run.py --detach ARGUMENT... in the clone, with its own Python.
# The other scripts here call it; they differ in their recipe and stages only.
set -euo pipefail
cd "$1"
shift
python=${FPDM_PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: no $python in $PWD; run 'make setup' there, or set FPDM_PYTHON to the Python that has the requirements" >&2
    exit 2
fi
exec "$python" pipeline/run.py --detach --cluster slurm "$@"
