"""Benchmark of fused distillation losses: one process per variant, interleaved pairs, peak memory in children.

`protocol` (the parent, never imports torch) starts `worker` processes; a worker builds `inputs`, makes one of
`variants` and answers commands. `report` writes the CSV, the table and the plot.
"""
