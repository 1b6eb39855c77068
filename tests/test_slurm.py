"""scripts/slurm/train.sbatch with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "slurm" / "train.sbatch"


def test_two_jobs_on_a_node_meet_at_different_ports(tmp_path):
    for name, text in {"scontrol": "echo node1; sleep 0.1; echo node2", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def endpoint(job: str) -> tuple[str, int]:
        slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPT), "--seed", "3"]
        words = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
        assert words[-3:] == ["train.py", "--seed", "3"]
        host, port = words[words.index("--rdzv_endpoint") + 1].split(":")
        return host, int(port)

    one, other = endpoint("4194303"), endpoint("4194304")
    assert one[0] == other[0] == "node1"
    assert one[1] != other[1]
    assert 1024 < min(one[1], other[1]) <= max(one[1], other[1]) < 32768  # below the ports of outgoing connections
