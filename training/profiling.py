"""--profile: the operators that take the most time in a few training steps, and a trace of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# Not profiled: the steps in which compilation, the allocator and data workers start. The last warms up the profiler.
WARMUP_STEPS = 5
TRACE = "trace.json"
OPERATORS = 15


class StepProfiler:
    """Profiles training steps after the first WARMUP_STEPS of this process; call `step` after each one.

    What comes between two steps, such as an evaluation, is profiled too. At the end `say` gets torch's table of
    operators, and the folder trace.json, for ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        """steps: how many to profile; with 0 nothing is done."""
        self.folder, self.device, self.say = folder, device, say
        self.steps_done = 0
        self.profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            phases = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=steps, repeat=1)
            self.profile = profile(activities=activities, schedule=phases, on_trace_ready=self._report)
            self.profile.start()

    def step(self) -> None:
        """Tell the profiler that a training step has ended."""
        self.steps_done += 1
        if self.profile is not None:
            self.profile.step()

    def close(self) -> None:
        """After the last training step, which may come before all are profiled: those that were are reported."""
        if self.profile is not None:
            self.profile.stop()
            if self.steps_done <= WARMUP_STEPS:
                self.say(f"--profile: nothing to show, as it begins after {WARMUP_STEPS} steps")

    def _report(self, found: profile) -> None:
        if self.steps_done <= WARMUP_STEPS:
            return
        found.export_chrome_trace(str(self.folder / TRACE))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        self.say(found.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=40))
        self.say(f"written {self.folder / TRACE}; open it in ui.perfetto.dev")
