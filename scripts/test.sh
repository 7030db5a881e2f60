#!/usr/bin/env bash
# Set up and run the test suite without its slow part. Arguments go to pytest: scripts/test.sh -k losses, -m slow.
set -euo pipefail

trap 'echo; echo "luffy: stopped." >&2; exit 130' INT
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
cd "$root"
"$LUFFY_VENV/bin/python" -m pytest -m "not slow" "$@"
