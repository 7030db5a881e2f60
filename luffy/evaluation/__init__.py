"""Evaluation that can be believed: many answers to each problem, intervals, tests, and a report."""
