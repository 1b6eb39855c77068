"""Runs of train.py in several processes, one after the other in the same ones, as starting them takes longer."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny.runs import ROOT

WORKER = ROOT / "tests" / "parallel_worker.py"


def torchrun(processes: int, *command, **options) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True, **options)


def run_together(processes: int, runs: list[list[str]], folder: Path, last_fails: bool = False) -> str:
    """What they print. The first run that fails ends the processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    process = torchrun(processes, WORKER, folder / "runs.json", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=600)
    assert (process.returncode != 0) == last_fails, output[-5000:]
    return output
