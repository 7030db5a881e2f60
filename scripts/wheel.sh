#!/usr/bin/env bash
# What others install: an sdist, and a wheel for the torch of .venv. docs/packages.md says for whom.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: scripts/wheel.sh [FOLDER] [--check]

Sets up as scripts/test.sh does, and makes an sdist and a wheel in FOLDER (default: dist/ in this project).

  --check   also install the wheel into an empty environment, with torch, triton, pytest and nothing else of this
            project, and run the kernels' tests there
HELP
}

out='' check=''
for argument in "$@"; do
    case $argument in
    -h | --help)
        usage
        exit 0
        ;;
    --check) check=yes ;;
    -*)
        printf 'luffy: unknown argument %s; scripts/wheel.sh --help\n' "$argument" >&2
        exit 2
        ;;
    *) out=$(realpath -m -- "$argument") ;;
    esac
done

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
bin=$LUFFY_VENV/bin
out=${out:-$root/dist}

made=$(mktemp -d)
trap 'rm -rf -- "$made"' EXIT
echo "luffy: building with torch $("$bin/python" -c 'import torch; print(torch.__version__)')"
"$bin/python" -m build --no-isolation --outdir "$made" "$root" >"$made/log" 2>&1 || {
    tail -25 "$made/log" >&2
    exit 1
}
mkdir -p "$out"
cp "$made"/*.tar.gz "$out"
# torch's libraries are torch's; they are in the process before ours is loaded
PATH="$bin:$PATH" "$bin/python" -m auditwheel repair --plat auto --exclude 'libtorch*.so' --exclude 'libc10*.so' \
    --wheel-dir "$out" "$made"/*.whl >"$made/log" 2>&1 || {
    tail -25 "$made/log" >&2
    exit 1
}
wheel=$(ls -t "$out"/luffy_rl-*.whl | head -1)
echo "luffy: $wheel"
[ -z "$check" ] && exit 0

"$bin/python" -m venv "$made/empty"
torch=$("$bin/python" -c 'import torch; print(torch.__version__)')
"$made/empty/bin/pip" install --quiet --disable-pip-version-check "$wheel" "torch==$torch" numpy pytest pytest-timeout \
    triton 2>&1 | { grep -v "is ignored: it is neither" || true; }
mkdir "$made/tests"
cp "$root"/tests/{conftest,bits,ranks,test_logprobs,test_policy_loss,test_cross_entropy,test_cpp_rows}.py \
    "$root"/tests/{test_token_losses,test_library,test_triton,test_vocab_parallel,test_poison}.py "$made/tests"
cd "$made"
"$made/empty/bin/python" - <<'PYTHON'
import sys, time

began = time.perf_counter()
import torch

between = time.perf_counter()
import luffy_kernels

print(f"luffy: luffy_kernels from {luffy_kernels.__file__.split('site-packages')[-1]}, "
      f"{time.perf_counter() - between:.2f} s beyond torch's {between - began:.2f} s")
print(luffy_kernels.status())
assert "empty" in luffy_kernels.__file__ and luffy_kernels._native.error is None, luffy_kernels._native.error
heavy = sys.modules.keys() & {"transformers", "vllm", "triton", "numpy.testing", "luffy"}
assert not heavy, heavy
PYTHON
"$made/empty/bin/python" -m pytest -q -p no:cacheprovider -m "not slow" "$made/tests"
