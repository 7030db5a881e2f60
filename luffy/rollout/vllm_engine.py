"""vLLM in the trainer's own process: token ids in, token ids and log-probs out.

Sampling is a pure function of (weights, prompt, seed): every request carries its own seed, so a resumed run draws what
the uninterrupted one would have drawn. Log-probs are those of the distribution actually sampled from (temperature
applied). This file, `stepping.py` and `worker.py` are the only ones that know vLLM's insides.
"""

import inspect
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from luffy.config import RolloutConfig
from luffy.errors import UserError
from luffy.rollout import worker
from luffy.rollout.engine import Generation, Ids, Request
from luffy.rollout.explain import explain
from luffy.rollout.peers import Peers
from luffy.rollout.stepping import Stepping, stream
from luffy.weights import hf_weights

if TYPE_CHECKING:
    from luffy.model import Policy

# Read by vLLM when it is imported. One process, no telemetry; torch's own threads, unpinned, shared with the trainer.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


Dtype = Literal["bfloat16", "float32"]
UNFINISHED = "another stream or generation is not over; take all of it, or close it"
ADVICE = (
    "copy the model again if its files are meant, else see `luffy doctor`; VLLM_LOGGING_LEVEL=INFO shows all vLLM says"
)
FORGOTTEN = -1
"""Version of weights that nobody has."""


class VllmEngine:
    """An in-process vLLM with the model at `path`; answers end with `eos_token_id`. Where there are several `ranks`
    each has an engine of its own, with all of the model, or `rollout.tensor_parallel` of them share one.

    Raises:
        UserError: vLLM is not installed or does not start (its own reason is given).
    """

    def __init__(
        self,
        path: str,
        config: RolloutConfig,
        *,
        dtype: Dtype,
        eos_token_id: int,
        max_model_len: int,
        trust_remote_code: bool = False,
        ranks: int = 1,
        version: int = 0,
    ) -> None:
        self._stream: Callable[[], Generator[Ids] | None] = lambda: None
        """The one that was asked for last, if somebody still has it."""
        self.eos_token_id, self.version, self._sleeps = eos_token_id, version, config.sleep
        self._peers = Peers(config.tensor_parallel) if config.tensor_parallel > 1 and ranks > 1 else None
        # the other ranks' processes are in its process group; each engine is one of its own all the same
        launched: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}
        try:
            from vllm import LLM
        except Exception as error:  # a build for another torch or CPU fails in ways of its own
            raise UserError(
                f"rollout: vLLM cannot be imported ({explain(str(error) or type(error).__name__)}); run "
                f"scripts/setup.sh, or install the `cpu` or `cuda` extra of luffy-rl"
            ) from error
        try:
            self.llm = LLM(
                path,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=config.max_sequences,
                gpu_memory_utilization=config.memory_fraction,
                kv_cache_memory_bytes=kv_cache_bytes(config),
                enforce_eager=config.eager,
                enable_sleep_mode=config.sleep,
                tensor_parallel_size=config.tensor_parallel,
                logprobs_mode="processed_logprobs",
                # vLLM 0.32 rewinds a seeded generator after a partial prefill, which CPU generators cannot do
                enable_chunked_prefill=torch.cuda.is_available(),
                generation_config="vllm",  # no sampling defaults from the checkpoint behind the config's back
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                **launched,
            )
        except Exception as error:  # vLLM raises anything here; whatever it is, its last line is what helps
            reason = explain(str(error) or type(error).__name__, otherwise=f"; {ADVICE}")
            raise UserError(f"rollout: vLLM failed to start: {reason}") from error
        if self._sleeps:
            self._sleep()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """With `rollout.sleep` the KV cache exists inside alone; afterwards the weights are gone too (level 2), for a
        sync comes before anything else."""
        if not self._sleeps:
            yield
            return
        self.llm.wake_up(tags=["kv_cache"])
        try:
            yield
        finally:
            self._sleep()

    def _sleep(self) -> None:
        self.llm.sleep(level=2)
        self.version = FORGOTTEN

    def forget_prompts(self) -> None:
        """Empty the prefix cache: how a prompt is computed shall not depend on what was asked before."""
        self.llm.reset_prefix_cache()

    def begin(self, requests: Sequence[Request], temperature: float) -> Generation:
        stream = self._stream()
        if stream is not None and inspect.getgeneratorstate(stream) == inspect.GEN_SUSPENDED:
            raise RuntimeError(f"VllmEngine: {UNFINISHED}")  # each step's outputs reach only whoever takes the step

        def answered(requests: Sequence[Request]) -> Stepping:
            engine: Any = self.llm.llm_engine
            return Stepping(engine, requests, temperature, eos_token_id=self.eos_token_id, version=self.version)

        return answered(requests) if self._peers is None else self._peers.share(requests, answered)

    def stream(self, request: Request, temperature: float) -> Generator[Ids]:
        """The tokens of its one completion so far, each time there are more. Nothing else may be asked meanwhile."""
        if self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(f"VllmEngine: {UNFINISHED}")
        made = stream(self.llm.llm_engine, request, temperature, eos_token_id=self.eos_token_id)
        self._stream = weakref.ref(made)
        return made

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        """Log-prob of every token but the first of each sequence, at temperature 1, nats."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        requests: Any = [{"prompt_token_ids": list(ids)} for ids in sequences]
        self.llm.reset_prefix_cache()
        outputs: Any = self.llm.generate(requests, params, use_tqdm=False)
        return [
            [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def sync(self, policy: "Policy", dtype: torch.dtype, version: int) -> int:
        """Every weight in place, by its Hugging Face name. The prefix cache is emptied: it belongs to the old ones.

        Raises:
            UserError: the model has parameters that the policy has nothing for.
        """
        if self._sleeps and self.version == FORGOTTEN:
            self.llm.wake_up(tags=["weights"])
        sent = 0

        def stream():
            nonlocal sent
            for name, tensor in hf_weights(policy, dtype):
                sent += 1
                yield name, tensor

        [missing] = self.llm.collective_rpc(worker.load, args=(stream(),))
        if missing:
            raise UserError(f"rollout: vLLM has nothing for {missing[0]} ({len(missing)} parameters) after a sync")
        self.llm.reset_prefix_cache()
        self.version = version
        return sent

    def abort(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine's memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def kv_cache_bytes(config: RolloutConfig) -> int | None:
    """Bytes of vLLM's cache; None: what `rollout.memory_fraction` leaves."""
    gib = config.kv_cache_gib
    if gib is None and not torch.cuda.is_available():
        gib = 1.0  # vLLM would count the trainer's own memory against its share
    return None if gib is None else int(gib * 2**30)
