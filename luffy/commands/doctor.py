"""`luffy doctor`."""

import argparse
import os
from typing import Any

from luffy.commands.arguments import add_command, add_json


def add_doctor(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        run_doctor,
        help="what this machine has, what it lacks, and what was never run",
        description="Look at this machine: versions that must go together, GPU and driver, compiler, memory, disks, "
        "caches. Each problem comes with its remedy, and makes the exit code 1.",
        examples=(
            "luffy doctor",
            "luffy doctor --report > report.md  # for an issue",
            "luffy doctor --json",
        ),
    )
    form = doctor.add_mutually_exclusive_group()
    form.add_argument(
        "--report", action="store_true", help="as Markdown for a bug report: no paths, no values of variables"
    )
    add_json(form)


def run_doctor(args: argparse.Namespace) -> int:
    names = list(os.environ)  # the user's: what is examined sets more, for libraries
    from luffy.console import print_json
    from luffy.doctor import examine, print_findings, print_report, record

    findings = examine()
    if args.json:
        print_json(record(findings))
    elif args.report:
        print_report(findings, names)
    else:
        print_findings(findings)
    return int(any(finding.lacks for finding in findings))
