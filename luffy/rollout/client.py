"""One vLLM server over HTTP, as `luffy.rollout.serve` starts it."""

from typing import Any

import httpx

from luffy.errors import first_line
from luffy.rollout.engine import Completion, Ids, Span

Params = dict[str, Any]


class Unreachable(Exception):
    """The server did not answer, or not with what was asked for: try again, here or elsewhere."""


class Refused(Exception):
    """The server answered that it will not do this, whatever the number of tries."""


class Cut(Exception):
    """Sampling was ended before the answers were; `completions` has what there is."""

    def __init__(self, completions: list[Completion]) -> None:
        super().__init__()
        self.completions = completions


class Client:
    """url: http://HOST:PORT. key: sent with every request, never logged."""

    def __init__(self, url: str, key: str | None, connections: int) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=connections + 4, max_keepalive_connections=connections + 4)
        # trust_env: a proxy of the environment has no business between these two
        self._http = httpx.Client(base_url=url, headers=headers, limits=limits, timeout=None, trust_env=False)
        self.away = False
        """It was silent when it was asked last: nothing else is asked of it, and what it has is asked of others."""

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        try:
            return self._http.get("/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def generate(self, prompt: Ids, params: Params, salt: str, name: str) -> list[Completion]:
        """salt: requests of another one share no cached prefix with these: the weights were others. name: of this
        request, to `abort` it by.

        Raises:
            Unreachable, Refused; Cut when it was aborted.
        """
        body = {"token_ids": list(prompt), "sampling_params": params, "cache_salt": salt, "request_id": name}
        choices = sorted(self._post("/inference/v1/generate", body)["choices"], key=lambda choice: choice["index"])
        found = [_completion(choice) for choice in choices]
        if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            raise Cut(found)
        return found

    def score(self, sequence: Ids, salt: str) -> list[float]:
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": list(sequence), "sampling_params": params, "cache_salt": salt}
        entries = self._post("/inference/v1/generate", body)["prompt_logprobs"]
        pairs = zip(sequence[1:], entries[1:], strict=True)
        return [entry[str(token)]["logprob"] for token, entry in pairs]

    def describe(self) -> dict[str, Any]:
        """What `luffy.rollout.worker` says of its model and versions."""
        return self._call("luffy_describe", {}, 60)[0]

    def version(self, timeout: float = 30) -> int | None:
        """Of its weights, asked of its engine; None where nobody has said yet.

        Raises:
            Unreachable.
        """
        try:
            said = self._http.get("/weight_info", timeout=timeout).json()["weight_version"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Unreachable(f"{self.url}: {first_line(error)}") from error
        return int(said) if said.lstrip("-").isdecimal() else None

    def update(self, folder: str, version: int, timeout: float, silence: float) -> list[str]:
        """Load the weights of a folder; returns the parameters that it has nothing for. Requests in flight wait, and go
        on with the new weights; where loading fails they wait on, for it may have a part of them.

        timeout: of loading, silence: of all else, seconds.
        """
        self.pause(silence)
        self.set_version(-1)
        found = self._call("luffy_load", {"folder": folder}, timeout)
        self.set_version(version)
        self.resume()
        return _missing(found)

    def pause(self, timeout: float = 60) -> None:
        """Requests in flight wait."""
        self._post("/pause", {}, timeout, params={"mode": "keep"})

    def resume(self) -> None:
        self._post("/resume", {}, 60)

    # A broadcast (luffy.rollout.broadcast), in the order of its calls.

    def workers(self) -> int:
        """Processes that hold a share of the model."""
        return len(self._call("luffy_group", {}, 60))

    def group(self) -> str | None:
        """The group that broadcasts to all of its workers."""
        names = {worker["group"] for worker in self._call("luffy_group", {}, 60)}
        return names.pop() if len(names) == 1 else None

    def join(self, about: dict[str, Any], timeout: float) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": about}, timeout)

    def start_update(self) -> None:
        self._post("/start_weight_update", {}, 60)

    def receive(self, described: dict[str, Any], timeout: float) -> None:
        self._post("/update_weights", {"update_info": described}, timeout)

    def finish_update(self, version: int) -> list[str]:
        """The parameters that it has nothing for."""
        self._post("/finish_weight_update", {"weight_version": str(version)}, 60)
        return _missing(self._call("luffy_group", {}, 60))

    def abort(self, names: list[str], timeout: float) -> None:
        # the names by which vLLM 0.32's endpoint registers requests
        self._post("/abort_requests", {"request_ids": [f"generate-tokens-{name}" for name in names]}, timeout)

    def set_version(self, version: int) -> None:
        self._post("/update_weight_version", {"new_version": str(version)}, 60)

    def _call(self, method: str, arguments: dict[str, str], timeout: float) -> list[dict[str, Any]]:
        return self._post("/collective_rpc", {"method": method, "kwargs": arguments}, timeout)["results"]

    def _post(self, path: str, body: Any, timeout: float | None = None, **options: Any) -> Any:
        try:
            answer = self._http.post(path, json=body, timeout=timeout, **options)
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.url}: {first_line(error)}") from error
        if 400 <= answer.status_code < 500:
            raise Refused(f"{self.url}{path}: {_reason(answer)}")
        if answer.status_code >= 500:
            raise Unreachable(f"{self.url}{path}: {_reason(answer)}")
        return answer.json()


def _missing(workers: list[dict[str, Any]]) -> list[str]:
    return sorted({name for worker in workers for name in worker["missing"]})


def _completion(choice: dict[str, Any]) -> Completion:
    spans = tuple(
        Span(int(span["version"]) if span["version"].lstrip("-").isdecimal() else -1, span["start"], span["end"])
        for span in choice["weight_versions"] or ()
    )
    logp = tuple(entry["logprob"] for entry in (choice["logprobs"] or {"content": ()})["content"])
    return Completion(tuple(choice["token_ids"] or ()), logp, choice["finish_reason"] == "stop", spans)


def _reason(answer: httpx.Response) -> str:
    try:
        said = answer.json()
        text = said.get("error", said.get("detail", said)) if isinstance(said, dict) else said
        text = text.get("message", text) if isinstance(text, dict) else text
    except ValueError:
        text = answer.text
    return f"{answer.status_code} {str(text).strip().splitlines()[0] if str(text).strip() else ''}".strip()
