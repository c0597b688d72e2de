"""Benchmark of losses, shared-prefix attention and steps: a process per variant, interleaved pairs, peaks in children.

`protocol` (the parent, never imports torch) starts `worker` (losses) or `prefix_worker` processes; a worker builds
`inputs` and one of `variants` (or `attention`, `step`) and answers commands. `report` and `prefix_report` write the
CSV, the table and the plot.
"""
