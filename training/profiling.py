"""--profile: a trace of a few training steps, and the operators that took the most time in them.

`run` is train.py's Run.
"""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

# Steps before: of compiling, of the allocator, of workers that have yet to start. The last warms up the profiler.
WARMUP_STEPS = 5
TRACE = "trace.json"
OPERATORS = 15


class StepProfiler:
    """Profiles the steps after the first WARMUP_STEPS of this process, on rank 0; call `step` after each.

    What comes between two of them, such as an evaluation, is profiled too. The trace goes into the run folder, for
    ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, steps, folder, device, say):
        self.folder, self.device, self.say = folder, device, say
        self.steps, self.reported = 0, False
        self.profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            phases = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=steps, repeat=1)
            self.profile = profile(activities=activities, schedule=phases, on_trace_ready=self._report)
            self.profile.start()

    def step(self) -> None:
        self.steps += 1
        if self.profile is not None:
            self.profile.step()

    def close(self) -> None:
        """At the end of the training steps, which may come before all are profiled: those that were are reported."""
        if self.profile is not None:
            self.profile.stop()
            if not self.reported:
                self.say(f"--profile: nothing to show; it begins after {WARMUP_STEPS} steps")

    def _report(self, found: profile) -> None:
        if self.steps <= WARMUP_STEPS:
            return
        found.export_chrome_trace(str(self.folder / TRACE))
        lines = top_operators(found, self.device, self.steps - WARMUP_STEPS)
        self.say("\n".join([*lines, f"written {self.folder / TRACE}, to be opened in ui.perfetto.dev"]))
        self.reported = True


def top_operators(found: profile, device: torch.device, steps: int) -> list[str]:
    """A line for each of the operators with the most time of their own, on the GPU where there is one."""
    on_gpu = device.type == "cuda"
    # A kernel is an event of its own besides the operator that launched it.
    events = [event for event in found.key_averages() if event.device_type == DeviceType.CPU]
    rows = [((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000, e) for e in events]  # ms
    total = sum(time for time, _ in rows)
    lines = [
        f"{'GPU' if on_gpu else 'CPU'} time of {steps} steps by operator, without that of the operators it calls",
        "  ms a step   share  calls a step  operator",
    ]
    for time, event in sorted(rows, key=lambda row: -row[0])[:OPERATORS]:
        name = "(between operators)" if event.key.startswith("ProfilerStep") else event.key[:80]
        lines.append(f"{time / steps:11.3f}  {time / total:6.1%}  {event.count / steps:12.0f}  {name}")
    return lines
