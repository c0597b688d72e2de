"""SDFT on a small instruct model: it learns one-line tool calls from demonstrations (``python -m benchmarks.demo``)."""
