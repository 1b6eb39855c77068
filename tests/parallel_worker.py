"""What one of several processes does in the tests of training/parallel.py: several runs of train.py, one by one.

torchrun --nproc_per_node N tests/parallel_worker.py RUNS.json
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import train
from training.arguments import parse_arguments
from training.parallel import Parallel

torch.set_num_threads(1)
initialize = dist.init_process_group
dist.init_process_group = lambda *args: None if dist.is_initialized() else initialize(*args)  # once for all runs
Parallel.close = lambda self: None
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")  # needs no C++ compiler
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    code = train.main(parse_arguments(arguments))
    assert code == 0, (arguments, code)
dist.destroy_process_group()
