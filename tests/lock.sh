#!/usr/bin/env bash
# Writes constraints.txt: the newest versions of everything that pyproject.toml allows, as installed together. Arguments
# are requirements that narrow it; those of the last time stand in the file's first line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
make_environment "$work/venv" -e "$repository[dev,deepspeed]" "$@"
{
    printf '# bash tests/lock.sh'
    printf " '%s'" "$@"
    printf '\n'
    # Names and versions alone: which build of a version, and from where, is the installation'"'"'s to choose.
    "$work/venv/bin/python" -m pip freeze --exclude-editable --disable-pip-version-check | sed -E 's/\+[a-z0-9.]+$//'
} >"$work/constraints.txt"
if grep -qvE '^(#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+)$' "$work/constraints.txt"; then
    fail "not a name and a version: $(grep -vE '^(#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+)$' "$work/constraints.txt")"
fi
mv "$work/constraints.txt" "$repository/constraints.txt"
say "$(grep -c == "$repository/constraints.txt") packages are locked in constraints.txt"
