"""Problems in, token ids out.

    problems = load_problems("problems/train.parquet")
    examples, report = tokenize(problems, template, max_prompt_tokens=1024, max_trace_tokens=8192)
    ledger = Ledger(Stream(len(examples), batch_size=128, seed=47))

Deliberately absent: rewards, rollouts, packing. Importing this imports neither torch nor transformers.
"""

from luffy.data.batches import Ledger, Stream
from luffy.data.examples import Example, FilterReport, tokenize
from luffy.data.load import load_problems
from luffy.data.problem import DataError, Problem

__all__ = ["DataError", "Example", "FilterReport", "Ledger", "Problem", "Stream", "load_problems", "tokenize"]
