"""Serving: requests that arrive, wait, are served in continuous batches, and leave.

Who calls whom: `serve.serve` reads requests (`requests`), builds the cost of an iteration
(`cost`, from `tables`), lets `loop` run the rules on the records of `state`, with `ahead` for
several decode steps at once, and returns a `results.Serving`. `rates.sweep_rates` does so for many
rates, and `goodput.find_goodputs` for many machines, as `lanes`.
"""
