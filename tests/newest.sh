#!/usr/bin/env bash
# The tests on the newest packages that pyproject.toml allows (on a machine without a GPU with the locked torch), in an
# environment of their own. Arguments go to pytest; PYTHON as for run.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv="${TRL_EXTRAS_NEWEST_VENV:-$repository/.venv-newest}"
packages=(-e "$repository[test,quickstart]")
has_gpu || packages+=("$locked_torch")
# Of today: an environment of before is made anew.
[[ ! -f "$venv/.installed" ]] || : >"$venv/.installed"
make_environment "$venv" "${packages[@]}"
say_versions "$venv"
cd "$repository"
run_pytest "$venv" "$@"
