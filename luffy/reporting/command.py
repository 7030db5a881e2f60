"""`luffy report RUN...`: the page, once or kept up to date on loopback."""

import argparse
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luffy.commands.arguments import add_command, add_json, port
from luffy.errors import UserError

REFRESH_S = 10


def add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        help="one page about a run or several: curves, samples, what went wrong",
        description="Write one HTML file that needs no network: curves of the runs beside each other, samples of the "
        "last evaluation, and by rules what is wrong with a run.",
        examples=(
            "luffy report runs/quickstart",
            "luffy report runs/one runs/other --out compared.html",
            "luffy report runs/quickstart --watch  # serves it while the run trains",
            "luffy report runs/quickstart --json  # what is wrong, for a script",
        ),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE.html", help="default: report.html in the first run's folder")
    parser.add_argument("--watch", action="store_true", help="serve the page on loopback, new every 10 s")
    parser.add_argument("--port", type=port, default=8642, metavar="N", help="of --watch (default: %(default)s)")
    add_json(parser)


def run_report(args: argparse.Namespace) -> int:
    from luffy.console import print_json
    from luffy.reporting.page import write_report
    from luffy.reporting.rules import findings
    from luffy.reporting.runs import load

    if args.watch and args.out:
        raise UserError("report: --watch serves the page and --out writes it; choose one")
    if args.watch and args.json:
        raise UserError("report: --watch serves the page until it is stopped and has no result for --json; choose one")
    if len({Path(name).resolve() for name in args.runs}) < len(args.runs):
        raise UserError("report: a run is named twice")
    if args.watch:
        return watch(args.runs, args.port)
    runs = [load(name) for name in args.runs]
    out = Path(args.out or Path(args.runs[0], "report.html"))
    write_report(out, runs)
    wrong = {run.name: findings(run) for run in runs}
    if args.json:
        print_json({"report": str(out), "findings": {name: list(map(asdict, found)) for name, found in wrong.items()}})
        return 0
    for name, every in wrong.items():
        for found in every:
            print(f"{name}: {found.cause}: {found.seen}; {found.remedy}", file=sys.stderr)
    print(f"report: {out}")
    return 0


def served(names: list[str]) -> tuple[int, str]:
    """(HTTP status, page) of the runs as they are now."""
    from luffy.reporting.page import render, waiting
    from luffy.reporting.runs import NoStepYet, load

    try:
        return 200, render([load(name) for name in names], REFRESH_S)
    except NoStepYet as error:
        return 200, waiting("No step yet", f"Waits for the first step of {error.run}.", REFRESH_S)
    except UserError as error:
        return 503, waiting("No report", str(error), REFRESH_S)


def watch(names: list[str], port: int) -> int:
    """Until Ctrl-C."""
    import http.server

    from luffy.reporting.runs import NoStepYet, load

    for name in names:
        with suppress(NoStepYet):
            load(name)  # one that does not exist is better known now

    lock = threading.Lock()
    made: dict[tuple[Any, ...], tuple[int, str]] = {}

    def page() -> tuple[int, str]:
        """Made once of what the folders hold, for a HEAD, the GET that follows it and all tabs."""
        with lock:
            if (now := tuple(map(_state, names))) not in made:
                made.clear()
                made[now] = served(names)
            return made[now]

    class Page(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.head()

        def do_GET(self) -> None:
            self.wfile.write(self.head())

        def head(self) -> bytes:
            if self.path != "/":
                self.send_error(404)
                return b""
            status, text = page()
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            return data

        def log_message(self, *_: Any) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise UserError(f"report: port {port} cannot be had ({error.strerror}); take another --port") from error
    with server:
        print(f"report: http://127.0.0.1:{server.server_port}/   (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("report: ended", file=sys.stderr)
    return 0


def _state(name: str) -> tuple[tuple[int, int], ...]:
    """Changes with what a page is made of."""
    from luffy.run_folder import RunFolder

    run = RunFolder(name)
    files = (run.metrics, run.evals, run.path / "result.json", *run.samples.glob("*"), *run.tokens.glob("*"))
    return tuple((one.stat().st_mtime_ns, one.stat().st_size) if one.exists() else (0, 0) for one in files)
