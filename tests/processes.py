"""Scripts run as several processes on this machine's CPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
# standalone: a free port of the launcher's own choice
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")


def torchrun(script: Path, *arguments: object, processes: int = 2) -> None:
    """Run a script as so many processes to its end; fails with what they said."""
    command = [sys.executable, "-m", *TORCHRUN, str(processes), str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def a_rank() -> Iterator[None]:
    """Around a script's main part: what it had to say is said, and the process is gone.

    The interpreter's own end is left out: backends' threads may still run in it, and now and then
    one aborts the process ("terminate called without an active exception") after all is done.
    """
    yield
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
