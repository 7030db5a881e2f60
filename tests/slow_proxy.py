"""An HTTP proxy before a vLLM server that holds every request for answers back for some seconds:

python slow_proxy.py PORT URL SECONDS
"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


def main() -> None:
    port, url, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    limits = httpx.Limits(max_connections=256)
    server = httpx.Client(base_url=url, timeout=None, trust_env=False, limits=limits)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path == "/inference/v1/generate" and b'"prompt_logprobs"' not in body:
                time.sleep(seconds)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() in ("authorization", "content-type")
            }
            answer = server.request(self.command, self.path, content=body, headers=headers)
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers.get("content-type", "application/json"))
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = forward  # names of the library

        def log_message(self, *_) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
