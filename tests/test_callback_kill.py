"""A training with the callback in a process that is killed, and its continuation: the run that nobody killed."""

import os
import signal

import pytest
from tiny.processes import fork_of

SAVING = {"save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "linear", "max_steps": 24}
KILLED_AT = 13  # the attention has been frozen since step 9 or 10; what has a tau of auto freezes later
TAUS = {"fixed": {}, "auto": {"compute_interval": 2, "language_mlp_tau": None, "tau": "auto"}}
CASES = [("fixed", 1), ("auto", 2)]


def killed_run(folder, tau, accumulation):
    """In a process of its own."""
    from tiny import trainer as hf

    class Kills(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    config = hf.settings(**TAUS[tau])
    hf.run(folder, config, watchers=[Kills()], gradient_accumulation_steps=accumulation, **SAVING)


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(hf, tmp_path, monkeypatch):
    for tau, accumulation in CASES:
        folder, others = tmp_path / f"{tau}-{accumulation}", SAVING | {"gradient_accumulation_steps": accumulation}
        child = fork_of(monkeypatch, "tiny.trainer", killed_run, folder, tau, accumulation)
        child.start()
        child.join(timeout=120)
        assert child.exitcode == -signal.SIGKILL
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-10"]
        resumed, second = hf.run(folder, hf.settings(**TAUS[tau]), resume=True, **others)
        whole, first = hf.run(tmp_path / "whole", hf.settings(**TAUS[tau]), **others)
        before = [step <= 10 for step in first.monitor.frozen.values()]
        assert 0 < sum(before) < len(before) if tau == "auto" else len(before) == sum(before) == 8
        assert second.monitor.history() == first.monitor.history()
        assert hf.same(resumed.model, whole.model)
        assert optimizer_state(resumed) == optimizer_state(whole)


def optimizer_state(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return {index: {key: value.tolist() for key, value in kept.items()} for index, kept in state.items()}
