#!/usr/bin/env bash
# README command 1: accelerated preference optimization of a 135M model on completions that it samples itself.
# Needs python3 (3.11 or newer) with pip and venv, nothing else. Arguments go to quickstart.py: --help lists them.
#
#   PYTHON                        the interpreter to make the environment with (default: python3)
#   TRL_EXTRAS_QUICKSTART_VENV    where the environment lies (default: .venv-quickstart in the repository)
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
venv="${TRL_EXTRAS_QUICKSTART_VENV:-$repository/.venv-quickstart}"

say() { printf '[quickstart] %s\n' "$*"; }
fail() { printf '[quickstart] %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python is not there: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version 2>&1) is too old: Python 3.11 or newer is needed (set PYTHON to choose another)"

# An environment is reused if it was made for these requirements by this Python.
wanted="$("$python" --version && echo "$repository" && cat "$repository/pyproject.toml" "$repository/constraints.txt")"
if [[ -f "$venv/.installed" && "$(cat "$venv/.installed")" == "$wanted" ]]; then
    say "environment: $venv"
else
    say "making the environment $venv; this takes a few minutes, once"
    if [[ -e "$venv" && ! -f "$venv/.installed" ]]; then
        fail "$venv is there, but this script has not made it: remove it or set TRL_EXTRAS_QUICKSTART_VENV"
    fi
    # Marked as ours at once, so that the next run after an interrupted installation may begin anew.
    mkdir -p "$venv" && : >"$venv/.installed"
    "$python" -m venv --clear "$venv" || fail "python -m venv failed: on Debian and Ubuntu install the package python3-venv"
    : >"$venv/.installed"
    # At a terminal pip's own bars show how far it is; in a log they would be hundreds of lines.
    quiet=()
    [[ -t 1 ]] || quiet=(--quiet)
    "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
        -c "$repository/constraints.txt" -e "$repository[quickstart]"
    printf '%s\n' "$wanted" >"$venv/.installed"
fi

# glibc gives large blocks back to the system and takes them anew at every step, and idle OpenMP threads spin on cores
# that others could use: both cost CPU training a good part of its speed.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

say "starting"
exec "$venv/bin/python" "$repository/recipes/quickstart/quickstart.py" "$@"
