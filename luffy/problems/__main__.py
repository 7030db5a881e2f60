"""Print samples, or write the splits:

python -m luffy.problems --family digit_sum --n 5
python -m luffy.problems --family gcd --family product --n 2000 --out runs/problems
"""

import argparse

from luffy.problems import FAMILIES, SPLITS, TEACHERS, ProblemSpec, rows, write_splits


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, print or write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m luffy.problems", description="Sample generated problems.")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="repeatable; default: all")
    parser.add_argument("--n", type=int, default=5, help="problems per family and split (default 5)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split to print (default train)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0.0, help="fraction of traces with a wrong answer")
    parser.add_argument("--missing", type=float, default=0.0, help="fraction without a trace")
    parser.add_argument("--verbose", type=float, default=0.0, help="fraction of long-winded traces")
    parser.add_argument("--teacher", action="append", choices=sorted(TEACHERS), help="repeatable; default: terse")
    parser.add_argument("--out", help="write all three splits into this folder instead of printing")
    args = parser.parse_args(argv)
    families = tuple(args.family or FAMILIES)
    noise = {"wrong": args.wrong, "missing": args.missing, "verbose": args.verbose}
    common = {"seed": args.seed, "teachers": tuple(args.teacher or ("terse",)), **noise}
    counts = dict.fromkeys(SPLITS, args.n)
    try:
        spec = ProblemSpec(families=families, **counts, **common)
    except ValueError as error:
        parser.error(str(error))
    if args.out:
        for path in write_splits(spec, args.out).values():
            print(path)
        return 0
    for family in families:
        for row in rows(ProblemSpec(families=(family,), **counts, **common), args.split):
            trace = row["target"][0]["content"] if row["target"] else "(no trace)"
            print(f"[{family} {row['extra_info']['difficulty']}] {row['prompt'][-1]['content']}\n  {trace}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
