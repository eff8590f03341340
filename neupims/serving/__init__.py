"""Serving: requests that arrive, wait, are served in continuous batches, and leave.

Who calls whom: `serve.serve` reads requests (`requests`), builds the cost of an iteration
(`cost`), lets `loop` run the rules, and returns a `results.Serving`.
"""
