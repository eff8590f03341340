"""Serving: requests that arrive, wait, are served in continuous batches, and leave.

Who calls whom: `serve.serve` reads requests (`requests`), builds the cost of an iteration
(`cost`, from `tables`), lets `loop` run the rules, and returns a `results.Serving`.
`rates.sweep_rates` does so for many rates at once, as `lanes` of one program.
"""
