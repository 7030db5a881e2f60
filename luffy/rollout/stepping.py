"""Requests to a vLLM in this process, a decoding step at a time. With `vllm_engine.py` and `worker.py` the only place
that knows vLLM's insides; written for 0.32.
"""

import time
import uuid
from collections.abc import Generator, Sequence
from typing import Any

from luffy.rollout.engine import Completion, Request, Span


def sampling_params(request: Request, temperature: float, eos_token_id: int, final: bool = True) -> Any:
    """vLLM's. final: an output comes when all completions are there, not with every token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=request.count,
        temperature=temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop_token_ids=[eos_token_id],  # the checkpoint's own EOS may be another token
        logprobs=0,
        seed=request.seed if temperature else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if final else RequestOutputKind.CUMULATIVE,
    )


def stream(engine: Any, request: Request, temperature: float, *, eos_token_id: int) -> Generator[tuple[int, ...]]:
    """The tokens of one completion so far, each time there are more; let go of when nobody asks on."""
    name = uuid.uuid4().hex
    prompt = {"prompt_token_ids": list(request.prompt)}
    engine.add_request(name, prompt, sampling_params(request, temperature, eos_token_id, final=False))
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.request_id == name and output.outputs:
                    yield tuple(output.outputs[0].token_ids)
    finally:
        engine.abort_request([name])


class Stepping:
    """A generation that goes on while `take` waits, and only then. engine: vLLM's `LLMEngine`."""

    def __init__(
        self, engine: Any, requests: Sequence[Request], temperature: float, *, eos_token_id: int, version: int
    ) -> None:
        self._engine, self._version = engine, version
        prefix = uuid.uuid4().hex
        self._names = {f"{prefix}-{index}": index for index in range(len(requests))}
        for name, request in zip(self._names, requests, strict=True):
            params = sampling_params(request, temperature, eos_token_id)
            engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, params)

    @property
    def waiting(self) -> int:
        return len(self._names)

    def take(self, timeout: float) -> list[tuple[int, list[Completion]]]:
        deadline = time.monotonic() + timeout
        while self._names:
            done = [output for output in self._engine.step() if output.finished and output.request_id in self._names]
            if done:
                return [(self._names.pop(output.request_id), self._completions(output)) for output in done]
            if time.monotonic() >= deadline:
                break
        return []

    def stop(self) -> dict[int, list[Completion]]:
        left: dict[int, list[Completion]] = {index: [] for index in self._names.values()}
        for name, index in self._names.items():
            if output := self._sampled(name):
                left[index] = self._completions(output)
        self._engine.abort_request(list(self._names))
        self._names.clear()
        return left

    def _sampled(self, name: str) -> Any:
        """vLLM's output of a request as it is now. Its own abort makes one for streams alone."""
        from vllm.v1.engine import FinishReason

        processor, output = self._engine.output_processor, None
        for internal in list(processor.external_req_ids.get(name, ())):
            state = processor.request_states[internal]
            # of several samples, the last one asked has them all
            output = state.make_request_output([], None, FinishReason.ABORT, None) or output
            if state.parent_req is not None:  # an abort of its children leaves it behind
                processor.parent_requests.pop(state.parent_req.request_id, None)
        return output

    def _completions(self, output: Any) -> list[Completion]:
        return [self._completion(one) for one in sorted(output.outputs, key=lambda one: one.index)]

    def _completion(self, output: Any) -> Completion:
        token_ids = tuple(output.token_ids)
        logp = tuple(entry[token].logprob for token, entry in zip(token_ids, output.logprobs or (), strict=True))
        return Completion(token_ids, logp, output.finish_reason == "stop", (Span(self._version, 0, len(token_ids)),))
