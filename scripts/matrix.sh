#!/usr/bin/env bash
# What CI runs (.ci/run), under each setting in which CPUs and users differ; prints a table.
#
#   scripts/matrix.sh [SETTING ...] [-- PYTEST_ARGUMENT ...]      such as: scripts/matrix.sh avx2 user -- tests/unit
#
# Each in a fresh clone of what is committed, at the same path, so that .venv is made once for root and once for the
# other user. MATRIX_FOLDER (/tmp/fpdm-matrix; 7 GB a user) holds them and the logs, MATRIX_USER (nobody) is who is not root.
set -euo pipefail
cd "$(dirname "$0")/.."

SETTINGS=(plain default avx2 avx512 onednn-avx2 user)
folder=${MATRIX_FOLDER:-/tmp/fpdm-matrix}
other=${MATRIX_USER:-nobody}

# variables SETTING: what it puts into the environment.
variables() {
    case $1 in
        plain | user) ;;
        default | avx2 | avx512) echo "ATEN_CPU_CAPABILITY=$1" ;;
        onednn-avx2) echo ONEDNN_MAX_CPU_ISA=AVX2 ;;
        *) echo "matrix: no setting $1; there are: ${SETTINGS[*]}" >&2 && return 2 ;;
    esac
}

# why_not SETTING: nothing, or why it cannot be had here.
why_not() {
    case $1 in
        # PyTorch believes what it is told: kernels that the CPU lacks end it by an illegal instruction.
        avx2 | avx512) grep -qw "${1/avx512/avx512f}" /proc/cpuinfo || echo "this CPU has no $1" ;;
        user) [ "$(id -u)" = 0 ] || echo "only root can become $other; the rest ran as $(id -un)" ;;
    esac
}

# counted WORD LOG: the number before it in pytest's last line.
counted() { tail -n 3 "$2" | grep -oE "[0-9]+ $1" | tail -n 1 | cut -d ' ' -f 1 || true; }

# run SETTING PYTEST_ARGUMENT...: prints its line of the table.
run() {
    local setting=$1 owner reason clone=$folder/clone log=$folder/$1.log status=0 start=$SECONDS
    local -a as=() given=()
    shift
    read -ra given <<<"$(variables "$setting")"
    reason=$(why_not "$setting")
    if [ -n "$reason" ]; then
        printf '%-12s %s\n' "$setting" "not run: $reason"
        return
    fi
    owner=$(id -un)
    if [ "$setting" = user ]; then
        owner=$other
        as=(setpriv --reuid="$other" --regid="$(id -g "$other")" --init-groups
            env HOME="$folder/home" USER="$other" LOGNAME="$other")
    fi
    rm -rf "$clone" && git clone --quiet . "$clone" && mkdir -p "$folder/home"
    [ ! -d "$folder/venv-$owner" ] || mv "$folder/venv-$owner" "$clone/.venv"
    [ "$setting" != user ] || chown -R "$owner:$(id -g "$owner")" "$clone" "$folder/home"
    (cd "$clone" && "${as[@]}" env CI=true PYTEST_ADDOPTS="${*@Q}" "${given[@]}" bash .ci/run) \
        >"$log" 2>&1 </dev/null || status=$?
    [ ! -d "$clone/.venv" ] || mv "$clone/.venv" "$folder/venv-$owner"
    printf '%-12s %7s %7s %7s %8s  %s\n' "$setting" "$(counted passed "$log")" "$(counted failed "$log")" \
        "$(counted skipped "$log")" $((SECONDS - start)) "$status"
    [ $status = 0 ] || failed=1
}

chosen=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    variables "$1" >/dev/null
    chosen+=("$1")
    shift
done
[ $# = 0 ] || shift
mkdir -p "$folder" && chmod 755 "$folder"
grep -m 1 "model name" /proc/cpuinfo || uname -m
echo "commit $(git rev-parse --short HEAD); logs in $folder"
printf '%-12s %7s %7s %7s %8s  %s\n' setting passed failed skipped seconds "exit status"
for setting in "${chosen[@]:-${SETTINGS[@]}}"; do run "$setting" "$@"; done
exit ${failed:-0}
