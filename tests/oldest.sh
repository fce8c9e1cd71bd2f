#!/usr/bin/env bash
# The tests on the oldest packages that pyproject.toml allows, in an environment of their own. Arguments go to pytest;
# PYTHON as for run.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv="${TRL_EXTRAS_OLDEST_VENV:-$repository/.venv-oldest}"
floors="$(mktemp)"
trap 'rm -f "$floors"' EXIT
"$python" - "$repository/pyproject.toml" >"$floors" <<'PYTHON'
import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extras = [project["optional-dependencies"][name] for name in ("quickstart", "qlora")]
for requirement in [*project["dependencies"], *sum(extras, [])]:
    name, floor = re.fullmatch(r"([\w.-]+)[>=]=([\w.]+).*", requirement).groups()
    print(f"{name}=={floor}")
PYTHON
make_environment "$venv" $(cat "$floors") -e "$repository[test,quickstart]"
say_versions "$venv"
cd "$repository"
run_pytest "$venv" "$@"
