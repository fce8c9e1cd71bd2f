#!/usr/bin/env bash
# README command 2: the checks and tests, in an environment of their own with the locked packages (constraints.txt).
# Needs Python 3.11 or newer with venv, nothing else; reaches for the network only to install. Arguments go to pytest:
# bash tests/run.sh -k rounds
#
#   PYTHON                   the interpreter to make the environment with (default: the first that is new enough)
#   TRL_EXTRAS_TESTS_VENV    where the environment lies (default: .venv-tests in the repository)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv="${TRL_EXTRAS_TESTS_VENV:-$repository/.venv-tests}"
make_environment "$venv" -c "$repository/constraints.txt" -e "$repository[dev]"
cd "$repository"
failed=()
check() {
    say "$*"
    "$venv/bin/python" -m "$@" || failed+=("$1${2:+ $2}")
}
check ruff check .
check ruff format --check .
check mypy
run_pytest "$venv" "$@" || failed+=(pytest)
if ((${#failed[@]})); then
    printf -v list '%s, ' "${failed[@]}"
    fail "failed: ${list%, }"
fi
say "all passed"
