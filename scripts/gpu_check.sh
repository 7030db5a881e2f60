#!/usr/bin/env bash
# Correctness and speed of the kernels on the GPU at hand, in one command that installs nothing.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: scripts/gpu_check.sh [--tiny] [--out FILE] [options of `python -m bench.gpu_check`]

Runs tests/test_device.py on the GPU, and tests/test_gpu_rollout.py where vLLM is installed, then times the
LM-head losses beside plain torch, bare GEMMs and the other projects' kernels that are installed here, within
10 minutes in all. Prints tables, compares them with
the roofline, and writes bench/results/gpu_check-<device>.json, which is worth sending to us. The exit code
is 0 only if every test passed; tables and JSON come either way.

Needs: Linux, an NVIDIA or AMD GPU, and a Python with torch 2.11, triton 3.6 or newer, and pytest.
Nothing is built or installed. Compared where installed: liger-kernel, cut-cross-entropy, verl, quack-kernels, trl.

  --tiny          toy shapes, on CPU where there is no GPU: tries the command itself, says nothing of speed
  --out FILE      the JSON, or a folder for it
  --shapes, --tokens, --modes, --minutes: see `python -m bench.gpu_check --help`

Variables:
  PYTHON          the Python to use          (default: .venv/bin/python in this project, else python3)
  LUFFY_RESULTS   folder for the JSON        (default: bench/results in this project)
HELP
}

die() {
    printf 'luffy: %s\n' "$1" >&2
    exit 2
}

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        usage
        exit 0
    fi
done

minutes=10
tests_at_most=240    # seconds: slow compilation must leave some minutes for the measurements
rollouts_at_most=180 # seconds: engines take their time to start
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
here=$PWD
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
command -v -- "$python" >/dev/null 2>&1 || die "$python was not found: name a Python with PYTHON=/path/to/python3."

# Versions are compared by their first two numbers: 2.11.0+cu130 and 2.12.0a0+git are both new enough.
missing=$("$python" - <<'CHECK'
import importlib.metadata, re, sys
wanted = {"torch": (2, 11), "triton": (3, 6), "pytest": (7, 0)}
if sys.version_info < (3, 11):
    print("Python 3.11 or newer (this is " + sys.version.split()[0] + ")")
for name, least in wanted.items():
    found = None
    for package in (name, "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")[: 4 if name == "triton" else 1]:
        try:
            found = found or importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    version = tuple(map(int, (re.findall(r"\d+", found or "") + ["0", "0"])[:2]))
    if found is None or version < least:
        print(name, ".".join(map(str, least)), "or newer" + (" (found " + found + ")" if found else ""))
CHECK
) || die "$python does not run."
if [ -n "$missing" ]; then
    printf 'luffy: %s lacks:\n%s\n' "$python" "$missing" >&2
    die "get them with: $python -m pip install 'torch>=2.11' 'triton>=3.6' pytest (or name another with PYTHON=)."
fi

stopped() {
    echo
    echo "luffy: stopped; run the same command again to start over." >&2
    exit 130
}
trap stopped INT
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export PYTHONPATH="$root/kernels:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

results=${LUFFY_RESULTS:-$root/bench/results}
mkdir -p "$results"

case " $* " in
*" --tiny "*) ;;
*) "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die "no GPU here: torch.cuda.is_available() is False. --tiny tries the command on this CPU." ;;
esac

cd "$root" # pytest's configuration and the package `bench` are here
tested=0
run_tests() { # at most SECONDS, FILE
    timeout --foreground -k 10 "$1" "$python" -m pytest -q -p no:cacheprovider --junitxml "$tmp/$(basename "$2" .py).xml" "$2"
}
run_tests "$tests_at_most" tests/test_device.py || tested=$?
[ "$tested" -ne 130 ] || stopped # now and then the signal reaches what runs here and not the trap
rolled_out=0
run_tests "$rollouts_at_most" tests/test_gpu_rollout.py || rolled_out=$?
[ "$rolled_out" -ne 130 ] || stopped
[ "$rolled_out" -ne 5 ] || rolled_out=0 # no test was chosen: vLLM is not here

cd "$here" # --out is relative to where the command was typed
left=$((minutes - (SECONDS + 59) / 60))
measured=0
"$python" -m bench.gpu_check --minutes "$((left > 1 ? left : 1))" --out "$results" --junit "$tmp/test_device.xml" "$@" ||
    measured=$?
[ "$measured" -ne 130 ] || stopped
for code in "$measured" "$tested" "$rolled_out"; do
    [ "$code" -eq 0 ] || exit "$code"
done
