#!/usr/bin/env bash
# Makes .venv from the pins in pyproject.toml; a second run finds it finished. With --ffcv also FFCV, which is built
# against libraries from Debian; with --slurm the daemons of SLURM; with --play the playground's packages; with --docs
# what builds the documents' site; with --test all four, transformers, and a browser. What is from Debian is installed
# where that is allowed, and named with its command where it is not.
set -euo pipefail
cd "$(dirname "$0")/.."

NEEDED_GB=10 # .venv takes 7, and wheels that pip has to download lie beside it for a while

# gigabytes KILOBYTES: without decimals, rounded down
gigabytes() { echo $(($1 * 1024 / 1000000000)); }

free_gb() { gigabytes "$(df -Pk . | awk 'NR == 2 { print $4 }')"; }

# pip_install ARGUMENT...: all it writes lies in .venv; neither a cache of the wheels nor a small /tmp is filled.
pip_install() {
    local status=0
    mkdir -p .venv/tmp
    TMPDIR=$PWD/.venv/tmp .venv/bin/python -m pip install --quiet --no-cache-dir --no-compile "$@" || status=$?
    rm -rf .venv/tmp
    return $status
}

# A stamp of what was installed from: a changed pin or a new command installs again, an unchanged one costs nothing.
commands=$(echo preprocess/*.py pipeline/*.py slurm/*.py)
stamp="$PWD $({ cat pyproject.toml scripts/console_scripts.py; echo "$commands"; } | cksum)" # editable: of this folder
if [ "$(cat .venv/.complete 2>/dev/null)" != "$stamp" ]; then
    python=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3 || true)}
    if ! "${python:-false}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
        echo "setup: needs Python 3.11, 3.12 or 3.13, found ${python:-none}; install it (apt-get install python3.11-venv) or set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    there=$([ ! -d .venv ] || du -sk .venv/ | cut -f 1) # a set-up that was broken off, or an older one
    if [ $(($(free_gb) + $(gigabytes "${there:-0}"))) -lt $NEEDED_GB ]; then
        echo "setup: needs $NEEDED_GB GB of disk in $PWD, found $(free_gb) GB free; free some, or clone to a larger disk" >&2
        exit 2
    fi
    echo "setup: installing the pinned requirements into .venv (a few minutes, once)"
    "$python" -m venv .venv
    if ! pip_install --editable '.[pipeline,demo,dev]'; then
        echo "setup: pip did not succeed (the reason is above); $(free_gb) GB are free now. The same command goes on" >&2
        exit 1
    fi
    echo "$stamp" >.venv/.complete
fi

# from_debian WHAT_FOR PACKAGE...: installs what is missing of the packages, or says what is left out without them.
from_debian() {
    local what_for=$1 install
    shift
    dpkg -s "$@" >/dev/null 2>&1 && return
    install="apt-get install -y --no-install-recommends $*"
    echo "setup: installing $*: $what_for"
    if [ "$(id -u)" != 0 ] || ! update_debian ||
        ! DEBIAN_FRONTEND=noninteractive $install "${quietly[@]}" -o APT::Keep-Downloaded-Packages=false >/dev/null; then
        echo "setup: $* could not be installed here. To have what it is for ($what_for): sudo $install" >&2
        return 1
    fi
}

quietly=(-qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)

# Debian's lists of packages, once. Another apt may hold them: no option makes apt wait for that.
update_debian() {
    local said
    [ -z "${updated:-}" ] || return 0
    for _ in {1..60}; do
        said=$(apt-get "${quietly[@]}" update 2>&1) && updated=yes && return
        [[ $said = *"get lock"* ]] || break
        sleep 5
    done
    echo "$said" >&2
    return 1
}

# extra NAME PACKAGES WHAT_FOR: installs an extra of pyproject.toml where a package of it is missing.
extra() {
    .venv/bin/python -c "import $2" 2>/dev/null && return
    echo "setup: installing $3"
    pip_install --editable ".[$1]"
}

case "${1:-}" in --test | --play) extra play nicegui "the playground's packages" ;; esac
case "${1:-}" in --test) extra rae transformers "the encoders of an AutoencoderRAE (150 MB)" ;; esac
case "${1:-}" in --test | --docs) extra docs "material, mkdocstrings_handlers.python" "what builds the documents' site (110 MB)" ;; esac

if [ "${1:-}" = --test ]; then
    command -v chromium >/dev/null ||
        from_debian "a test of the report opens it in a browser, and is left out without one" chromium || true
fi

if [[ "${1:-}" = --test || "${1:-}" = --slurm ]]; then
    # Debian starts none of these by itself; the tests start their own on the loopback interface.
    PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null ||
        from_debian "jobs run on a real SLURM with it; tests fail without one unless FPDM_WITHOUT_SLURM=1" \
            slurmctld slurmd slurm-client munge || true
fi

has_ffcv() { .venv/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("ffcv"))'; }

if [[ "${1:-}" = --test || "${1:-}" = --ffcv ]] && ! has_ffcv; then
    if from_debian "FFCV is built with it, for data.format=ffcv, whose tests are left out without it" \
        g++ pkg-config libopencv-imgproc-dev libturbojpeg0-dev; then
        echo "setup: building FFCV (a minute, 300 MB)"
        flags=$(mktemp -d /tmp/ffcv.XXXXXX) # it splits compiler flags at spaces, which the clone's path may have
        cp -r scripts/ffcv/. "$flags"
        PKG_CONFIG_PATH=$flags pip_install --editable '.[ffcv]' ||
            echo "setup: FFCV could not be built here (the reason is above); the tests of data.format=ffcv are left out" >&2
        rm -rf "$flags"
    fi
fi
