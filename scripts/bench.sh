#!/usr/bin/env bash
# Measure the CPU kernels beside plain torch and the other projects' losses, and write README's table from it.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: scripts/bench.sh

Sets up as scripts/test.sh does, installs what is compared (liger-kernel, trl, cut-cross-entropy), measures the
standard set in about 15 minutes on two cores, and writes bench/results/ops-<cpu>.jsonl, step-<cpu>.json, the
tables of README.md and docs/cpu-kernels.md and the plot. Run it on a machine that does nothing else.

Single cases: .venv/bin/python -m bench.ops --help. The update of a training step: -m bench.step --help.
HELP
}

for argument in "$@"; do
    case $argument in
    -h | --help)
        usage
        exit 0
        ;;
    *)
        printf 'luffy: unknown argument %s; scripts/bench.sh --help\n' "$argument" >&2
        exit 2
        ;;
    esac
done

trap 'echo; echo "luffy: stopped; results that were there stay." >&2; exit 130' INT
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
cd "$root"
python=$LUFFY_VENV/bin/python

# Peers may not move what the project pins.
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
"$python" -m pip --disable-pip-version-check freeze --exclude-editable | grep -E '^(torch|transformers|vllm)' >"$pins"
"$python" -c 'import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*extras["bench"], sep="\n")' |
    "$python" -m pip --disable-pip-version-check install --quiet --constraint "$pins" --requirement /dev/stdin

"$python" -m bench.ops --standard
"$python" -m bench.step
"$python" -m bench.report
