#!/usr/bin/env bash
# Makes .venv from the pins in pyproject.toml; a second run finds it finished. With --ffcv also FFCV, which is built
# against libraries from Debian; with --test that, and all else the tests need from Debian. What is from Debian is
# installed where that is allowed, and named with its command where it is not.
set -euo pipefail
cd "$(dirname "$0")/.."

# A stamp of what was installed from: a changed pin installs again, an unchanged one costs nothing.
stamp="$PWD $(cksum <pyproject.toml)" # the editable install points at this folder
if [ "$(cat .venv/.complete 2>/dev/null)" != "$stamp" ]; then
    python=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3 || true)}
    if ! "${python:-false}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        echo "setup: needs Python 3.11 or 3.12, found ${python:-none}; install it (apt-get install python3.11-venv) or set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    echo "setup: installing the pinned requirements into .venv (a few minutes, 6 GB, once)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --editable '.[pipeline,demo,dev]'
    echo "$stamp" >.venv/.complete
fi

quietly=(-qq -o DPkg::Lock::Timeout=300)

from_debian() { # succeeds if the packages were installed
    [ "$(id -u)" = 0 ] && apt-get "${quietly[@]}" update &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${quietly[@]}" "$@" >/dev/null
}

if [ "${1:-}" = --test ] && ! command -v chromium >/dev/null; then
    echo "setup: installing chromium, which a test of the report opens it in"
    if ! from_debian chromium; then
        echo "setup: chromium could not be installed here; the tests that need it will not run. To have them: sudo apt-get install -y --no-install-recommends chromium" >&2
    fi
fi

has_ffcv() { .venv/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("ffcv"))'; }

if [[ "${1:-}" = --test || "${1:-}" = --ffcv ]] && ! has_ffcv; then
    needed=(g++ pkg-config libopencv-imgproc-dev libturbojpeg0-dev)
    echo "setup: building FFCV, which data.format=ffcv is made with (a minute, 300 MB)"
    if ! dpkg -s "${needed[@]}" >/dev/null 2>&1 && ! from_debian "${needed[@]}"; then
        echo "setup: FFCV needs libraries that could not be installed here; data.format=ffcv cannot be made, and its tests will not run. To have them: sudo apt-get install -y --no-install-recommends ${needed[*]}, then scripts/setup.sh --ffcv" >&2
    elif ! PKG_CONFIG_PATH="$PWD/scripts/ffcv" .venv/bin/python -m pip install --quiet --editable '.[ffcv]'; then
        echo "setup: FFCV could not be built here (the reason is above); data.format=ffcv cannot be made, and its tests will not run" >&2
    fi
fi
