"""What one of several processes does in the tests of training/parallel.py: several runs of train.py, one by one.

torchrun --nproc_per_node N tests/parallel_worker.py RUNS.json
"""

import errno
import functools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import train
from training.arguments import parse_arguments
from training.parallel import Parallel

torch.set_num_threads(1)
initialize = dist.init_process_group
dist.init_process_group = lambda *args: None if dist.is_initialized() else initialize(*args)  # once for all runs
Parallel.close = lambda self: None
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # needs no C++ compiler


def refuses(function, path_of, step: str):
    """The function, for which rank 1 has no room left in a run named full_disk, at that step."""

    def refused(*args, **kwargs):
        path = str(path_of(*args))
        if dist.get_rank() == 1 and "full_disk" in path and step in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return refused


HuggingFaceStorageWriter.write_data = refuses(
    HuggingFaceStorageWriter.write_data, lambda self, *_: self.path, "step_00000002"
)
torch.save = refuses(torch.save, lambda value, path="", *_: path, "step_00000004")
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    code = train.main(parse_arguments(arguments))
    assert code == 0, (arguments, code)
dist.destroy_process_group()
