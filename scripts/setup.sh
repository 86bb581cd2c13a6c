#!/usr/bin/env bash
# Makes .venv from the pins in pyproject.toml; a second run finds it finished. With --test also what the tests need
# from Debian: it is installed where that is allowed, and named with its command where it is not.
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

# need PROGRAM WHAT_FOR PACKAGE...: installs packages that a test needs, where PROGRAM is not there yet.
need() {
    local program=$1 what_for=$2 install quietly=(-qq -o DPkg::Lock::Timeout=300)
    shift 2
    PATH=$PATH:/usr/sbin command -v "$program" >/dev/null && return
    install="apt-get install -y --no-install-recommends $*"
    echo "setup: installing $*: $what_for"
    if [ "$(id -u)" != 0 ] ||
        ! { apt-get "${quietly[@]}" update && DEBIAN_FRONTEND=noninteractive $install "${quietly[@]}" >/dev/null; }; then
        echo "setup: $* could not be installed here. To have what it is for ($what_for): sudo $install" >&2
    fi
}

if [ "${1:-}" = --test ]; then
    need chromium "a test of the report opens it in a browser, and is left out without one" chromium
    # Debian starts none of these by itself; the tests start their own on the loopback interface.
    need slurmctld "tests run jobs on a real SLURM, and fail without one unless FPDM_WITHOUT_SLURM=1" \
        slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core
fi
