"""A vLLM server as the trainer needs it, on this machine or another one:

    python -m luffy.rollout.serve --model MODEL --port 8001 [options of vLLM's server]

Tokens in, tokens out; log-probs of the distribution that is sampled from; endpoints that take new weights. It listens
on 127.0.0.1 unless --host says otherwise: whoever reaches its port can replace its weights, so keep it in a private
network. VLLM_API_KEY in its environment guards the generating endpoint alone.
"""

import os
import runpy
import sys

from luffy.rank import end_with_parent

OURS = (
    *("--tokens-only", "--worker-extension-cls", "luffy.rollout.worker.WorkerExtension"),
    *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", "0"),
    "--disable-uvicorn-access-log",
)


def arguments(given: list[str]) -> list[str]:
    """vLLM's options: those that the trainer relies on, and what was given."""
    host = [] if any(word.split("=")[0] == "--host" for word in given) else ["--host", "127.0.0.1"]
    return [*host, *OURS, *given]


def main() -> None:
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if parent := os.environ.pop("LUFFY_SERVER_OF", None):
        end_with_parent(int(parent))
    os.environ["LUFFY_SERVER_PID"] = str(os.getpid())  # vLLM's other processes would outlive it (luffy.rollout.worker)
    sys.argv[1:] = arguments(sys.argv[1:])
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
    else:
        main()
