# Sourced by run.sh, newest.sh, oldest.sh and lock.sh: which Python, and how an environment of a script's own is made.
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# An unpinned torch may bring several gigabytes of CUDA along on a machine without a GPU: there it is the locked one.
locked_torch="$(grep '^torch==' "$repository/constraints.txt" 2>/dev/null || echo torch)"

say() { printf '[tests] %s %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { printf '[tests] %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if new_enough "$candidate"; then python="$candidate"; break; fi
    done
    [[ -n "$python" ]] || fail "there is no Python 3.11 or newer: install one, or set PYTHON to its path"
fi
new_enough "$python" || fail "$python ($("$python" --version 2>&1 | head -n 1 || true)) is not a Python 3.11 or newer: set PYTHON"

# make_environment FOLDER PIP-ARGUMENT...: an environment with what pip is told to install. It is reused if it was made
# for this repository, these arguments and the files that they name, by this Python.
make_environment() {
    local venv="$1" wanted
    shift
    wanted="$("$python" --version && echo "$repository" "$@" && cat "$repository/pyproject.toml" "$repository/constraints.txt")"
    if [[ -f "$venv/.installed" && "$(cat "$venv/.installed")" == "$wanted" ]]; then
        say "environment: $venv"
        return
    fi
    if [[ -e "$venv" && ! -f "$venv/.installed" ]]; then
        fail "$venv is there, but this script has not made it: remove it"
    fi
    say "making the environment $venv; this takes a few minutes, once"
    # Marked as ours at once, so that the next run after an interrupted installation may begin anew.
    mkdir -p "$venv" && : >"$venv/.installed"
    "$python" -m venv --clear "$venv" || fail "python -m venv failed: on Debian and Ubuntu install python3-venv"
    : >"$venv/.installed"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@"
    printf '%s\n' "$wanted" >"$venv/.installed"
}

# run_pytest FOLDER PYTEST-ARGUMENT...: the models are tiny, so that two processes with a thread each are the fastest.
# Nothing is downloaded.
run_pytest() {
    local venv="$1"
    shift
    say "pytest -n 2 $*"
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false \
        "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
}

say_versions() {
    say "with $("$1/bin/python" --version), $("$1/bin/python" -m pip list --format freeze --disable-pip-version-check |
        grep -E '^(accelerate|datasets|numpy|peft|pyarrow|torch|transformers|trl)==' | paste -sd' ')"
}
