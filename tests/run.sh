#!/usr/bin/env bash
# README command 2: the checks and tests, in an environment of their own. Needs Python 3.11 or newer with venv, nothing
# else; reaches for the network only to install. Arguments go to pytest: bash tests/run.sh -k rounds
#
#   PYTHON                   the interpreter to make the environment with (default: the first that is new enough)
#   TRL_EXTRAS_TESTS_VENV    where the environment lies (default: .venv-tests in the repository)
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${TRL_EXTRAS_TESTS_VENV:-$repository/.venv-tests}"

say() { printf '[tests] %s %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { printf '[tests] %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if new_enough "$candidate"; then python="$candidate"; break; fi
    done
    [[ -n "$python" ]] || fail "there is no Python 3.11 or newer: install one, or set PYTHON to its path"
fi
new_enough "$python" || fail "$python ($("$python" --version 2>&1 | head -n 1 || true)) is not a Python 3.11 or newer: set PYTHON"

# An environment is reused if it was made for this folder and these requirements by this Python.
constraints=()
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    hardware=gpu
else
    hardware=cpu
    # Without it pip may take a torch that brings several gigabytes of CUDA along.
    constraints=(-c "$repository/constraints-cpu.txt")
fi
wanted="$(
    "$python" --version
    echo "$hardware $repository"
    cat "$repository/pyproject.toml" "$repository/constraints-cpu.txt"
)"
if [[ -f "$venv/.installed" && "$(cat "$venv/.installed")" == "$wanted" ]]; then
    say "environment: $venv"
else
    if [[ -e "$venv" && ! -f "$venv/.installed" ]]; then
        fail "$venv is there, but this script has not made it: remove it or set TRL_EXTRAS_TESTS_VENV"
    fi
    say "making the environment $venv ($hardware); this takes a few minutes, once"
    # Marked as ours at once, so that the next run after an interrupted installation may begin anew.
    mkdir -p "$venv" && : >"$venv/.installed"
    "$python" -m venv --clear "$venv" || fail "python -m venv failed: on Debian and Ubuntu install python3-venv"
    : >"$venv/.installed"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
        ${constraints[@]+"${constraints[@]}"} -e "$repository[dev]"
    printf '%s\n' "$wanted" >"$venv/.installed"
fi

cd "$repository"
# The models are tiny, so that two processes with a thread each are the fastest. Nothing is downloaded.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
failed=()
check() {
    say "$*"
    "$venv/bin/python" -m "$@" || failed+=("$1${2:+ $2}")
}
check ruff check .
check ruff format --check .
check mypy
say "pytest -n 2 $*"
"$venv/bin/python" -m pytest -n 2 --dist worksteal "$@" || failed+=(pytest)
if ((${#failed[@]})); then
    printf -v list '%s, ' "${failed[@]}"
    fail "failed: ${list%, }"
fi
say "all passed"
