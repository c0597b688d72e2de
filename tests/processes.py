"""Run a test file as several ranks of a process group, each a fresh process."""

import os
import socket
import subprocess
import sys

import torch

# A guard against a process that waits for ever, not a bar: no test may fail because the machine is busy.
HANG_SECONDS = 1800


def run_ranks(file, world_size, *arguments, timeout=HANG_SECONDS, **environment):
    """`python file *arguments` once per rank, with torch's rendezvous variables; an AssertionError shows its stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, str(file), *map(str, arguments)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        for child in children:
            _, errors = child.communicate(timeout=timeout)
            assert child.returncode == 0, errors
    finally:  # a rank that waits for one that died would wait for ever
        for child in children:
            child.kill()


def leave():
    """End this rank at once: threads that a process group leaves at the interpreter's exit may abort the process."""
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
