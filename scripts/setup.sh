#!/usr/bin/env bash
# Make .venv and install the project into it: the one way in, for users and for CI.
# Call it, or source it to have $LUFFY_VENV. Nothing is done when nothing changed (a stamp in .venv says so).
# The decisions about packages are in install.py; here are only the interpreter, the folder and the stamp.
set -euo pipefail

luffy_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
LUFFY_VENV=${LUFFY_VENV:-$luffy_root/.venv}

luffy_die() {
    printf 'luffy: %s\n' "$1" >&2
    exit 1
}

# The first interpreter that is new enough, or $LUFFY_PYTHON.
luffy_find_python() {
    local candidate
    for candidate in ${LUFFY_PYTHON:+"$LUFFY_PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if command -v -- "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v -- "$candidate"
            return
        fi
        if [ -n "${LUFFY_PYTHON:-}" ]; then
            luffy_die "LUFFY_PYTHON=$LUFFY_PYTHON is not a Python 3.11 or newer."
        fi
    done
    luffy_die "no Python 3.11 or newer was found: install one, or name it with LUFFY_PYTHON=/path/to/python3."
}

# A folder that holds a working interpreter with pip; repairs what an interrupted run left.
luffy_make_venv() {
    local python
    if "$LUFFY_VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        return
    fi
    python=$(luffy_find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        luffy_die "$python lacks the venv module: install it (Debian and Ubuntu: apt install python3-venv)."
    echo "luffy: making $LUFFY_VENV with $("$python" --version)"
    if [ -f "$LUFFY_VENV/pyvenv.cfg" ]; then # ours, and broken
        "$python" -m venv --clear "$LUFFY_VENV"
    else
        "$python" -m venv "$LUFFY_VENV"
    fi
}

# What the installed packages follow from, and what the project itself does: one line each. Of its Python files the names
# alone, which an editable installation has a list of: a module that moved would be looked for where it was.
luffy_fingerprint() {
    local version
    version=$("$LUFFY_VENV/bin/python" -S -c 'import sys; print(sys.version, sys.prefix)' 2>/dev/null || true)
    printf 'packages %s\n' "$({
        printf '%s\n' "$luffy_root" "$version" "$1" "${LUFFY_VLLM:-}"
        cat "$luffy_root/pyproject.toml" "$luffy_root/scripts/install.py"
    } | cksum)"
    printf 'project %s\n' "$(cd "$luffy_root" && {
        find luffy kernels/luffy_kernels -name '*.py' 2>/dev/null | LC_ALL=C sort
        find CMakeLists.txt kernels/csrc -type f 2>/dev/null | LC_ALL=C sort | while IFS= read -r file; do
            cksum "$file"
        done
    } | cksum)"
}

luffy_setup() {
    local gpus extra=cpu stage=all stamp=$LUFFY_VENV/luffy-setup.stamp
    if gpus=$(nvidia-smi -L 2>/dev/null) && [[ $gpus == *"GPU "* ]]; then
        extra=cuda
    fi
    if [ -f "$stamp" ]; then
        if [ "$(luffy_fingerprint $extra)" = "$(cat "$stamp")" ]; then
            return
        fi
        if [ "$(luffy_fingerprint $extra | head -n 1)" = "$(head -n 1 "$stamp")" ]; then
            stage=project
        fi
    fi
    command -v -- "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
        luffy_die "no C++ compiler was found: install one (Debian and Ubuntu: apt install g++) or name it with CXX."
    luffy_make_venv
    rm -f "$stamp"
    "$LUFFY_VENV/bin/python" "$luffy_root/scripts/install.py" "$extra" "$stage" || exit $?
    luffy_fingerprint $extra >"$stamp"
}

luffy_setup
