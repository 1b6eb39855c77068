"""Several processes: they train and freeze as one with a larger batch, go on where they stopped, and end together."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny.data import write_rows
from tiny.families import FAMILIES, SIZES, words_of
from tiny.runs import TINY
from tiny.together import run_together, torchrun

import evaluate
import train
from training.arguments import parse_arguments
from training.checkpoint_folder import damage

# Each freeze is a round of its own, so that what lies before frozen matrices freezes when it does in one process.
FLAGS = TINY | {
    "batch_size": 2, "gradient_accumulation_steps": 2, "lr_mp": 0.01, "enable_grades": True, "vision_tau": 0.12,
    "language_tau": 0.12, "alpha": 0.3, "freeze_rounds": 100, "checkpoint_interval": 2, "keep_checkpoints": 9,
}  # fmt: skip
# Two rows a step of two processes, of rows most of which are text alone.
SPARSE = {"batch_size": 1, "gradient_accumulation_steps": 1, "enable_grades": False}
# Its metric needs nothing of earlier steps: three processes measure at once what two would.
THRICE = {"metric": "gradient_norm", "vision_tau": 3.5, "language_tau": 6.5}
WOKEN = {"metric": "gradient_norm", "vision_tau": 3, "language_tau": 5, "unfreeze_factor": 1.01, "probe_interval": 2}
ROLLBACK = {"metric": "rollback", "average_weights": 0.5, "lr_schedule": "constant", "rollback_rows": 3, "patience": 2,
            "vision_tau": 1e9, "language_tau": 1e-12, "alpha": 0}  # fmt: skip
TASKS = {"eval_tasks": "", "eval_tasks_interval": 2, "metric_for_best_model": "rows/accuracy", "eval_batch_size": 3,
         "max_training_steps": 4, "enable_grades": False}  # fmt: skip
MOLMO2 = FAMILIES["molmo2"]
CHANGE = {"metric": "gradient_change", "vision_tau": "auto", "language_tau": "auto"}


def some_texts(i: int) -> bool:
    return i % 5 == 2


def arguments(rows: Path, name: str, **flags) -> list[str]:
    given = {"train_dataset_path": rows, "test_dataset_path": rows, "output_dir": rows.parent, "run_name": name}
    return words_of(FLAGS | given | flags)


def step_4(folder: Path) -> Path:
    return folder / "checkpoints" / "step_00000004"


class Runs:
    """A folder of runs, each made when it is first asked for; those of two processes with all of their kind."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, {"rows"}
        self.rows = write_rows(folder / "rows", 40, text=some_texts)
        # With micro-batches that are text alone on one rank.
        self.uneven = write_rows(folder / "uneven_rows", 40, text=lambda i: i % 5 in (1, 2), sizes=SIZES)
        self.sparse = write_rows(folder / "sparse_rows", 40, text=lambda i: i % 4 != 0)

    def __truediv__(self, name: str) -> Path:
        if name not in self.made and name in ALONE:
            self.made.add(name)
            flags = ALONE[name] | {"batch_size": 4}
            assert train.main(parse_arguments(arguments(self._rows_of(name), name, **flags))) == 0
        elif name == "sparse" not in self.made:
            self.made.add(name)
            assert train.main(parse_arguments(arguments(self.sparse, name, **SPARSE | {"batch_size": 2}))) == 0
        for kind, runs in TOGETHER.items():
            if kind not in self.made and name in (kind, f"{kind}_resumed", *runs):
                self.made.add(kind)
                self._make(kind)
        return self.folder / name

    def _rows_of(self, name: str) -> Path:
        return self.sparse if "sparse" in name else self.uneven if "molmo2" in name else self.rows

    def _make(self, kind: str) -> None:
        """The runs of two processes, ddp or fsdp."""
        runs = [arguments(self.rows, kind, parallel=kind)]
        runs.append(arguments(self.rows, f"{kind}_resumed", parallel=kind, resume=step_4(self.folder / kind)))
        for name, flags in TOGETHER[kind].items():
            if "eval_tasks" in flags:
                flags = flags | {
                    "eval_tasks": write_rows(self.folder / f"{kind}_questions" / "rows", 9, text=lambda i: True)
                }
            if "resume" in flags:
                flags = flags | {"resume": step_4(self / flags["resume"])}
            runs.append(arguments(self._rows_of(name), name, parallel=kind, **flags))
        run_together(2, runs, self.folder)


# One process with the batch of two.
ALONE = {
    "one": {}, "one_matrices": {"freeze_prefix": False}, "one_norm": {"metric": "gradient_norm"},
    "one_lora": {"lora_rank": 2}, "one_woken": WOKEN, "one_change": CHANGE,
    "one_rollback": ROLLBACK, "one_molmo2": MOLMO2,
}  # fmt: skip
TOGETHER = {
    "ddp": {
        "ddp_rounds": {"freeze_rounds": 2, "freeze_prefix": False, "compile": True}, "sparse_ddp": SPARSE,
        "ddp_lora": {"lora_rank": 2}, "ddp_change": CHANGE,
        "ddp_rollback": ROLLBACK | {"feature_cache_gib": 0.1}, "ddp_tasks": TASKS,
        "ddp_molmo2": MOLMO2,
    },
    "fsdp": {
        "fsdp_compiled": {"compile": True}, "sparse_fsdp": SPARSE,
        "one_on_two": {"resume": "one", "resume_override": True}, "six": {"batch_size": 3} | THRICE,
        "fsdp_sampled": {"metric": "gradient_norm", "monitor_sample": 2},
        "fsdp_lora": {"lora_rank": 2, "activation_checkpointing": True, "loss_chunk_size": 5}, "fsdp_woken": WOKEN,
        "fsdp_rollback": ROLLBACK, "fsdp_tasks": TASKS,
        "fsdp_molmo2": MOLMO2 | {"activation_checkpointing": True}, "full_disk": {},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("two"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def history(folder: Path) -> dict:
    return json.loads((folder / "grades_history.json").read_text())


def freezes(folder: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["name"]) for event in history(folder)["events"]]


def lines(folder: Path, key: str) -> list[float]:
    found = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in found if key in line]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert freezes(ours) == freezes(theirs)
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert lines(ours, key) == pytest.approx(lines(theirs, key), rel=1e-3), key
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    # A bias of keys changes no attention: its gradient is rounding alone, of which Adam makes whole steps.
    for name in b.keys() - {"MP.pooling.k_proj.bias"}:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4, msg=name)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (ours, theirs))
    for key in ("steps", "stop_reason", "train_tokens", "frozen_share", "dropped", "parameters"):
        assert ours[key] == theirs[key], key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ddp", "one"), ("fsdp", "one"), ("ddp_rounds", "one_matrices"), ("fsdp_compiled", "one"),
        ("fsdp_lora", "one_lora"), ("ddp_lora", "one_lora"), ("ddp_change", "one_change"), ("fsdp_woken", "one_woken"),
        ("ddp_rollback", "one_rollback"), ("fsdp_rollback", "one_rollback"),
        ("ddp_molmo2", "one_molmo2"), ("fsdp_molmo2", "one_molmo2"),
    ],
)  # fmt: skip
def test_two_processes_train_and_freeze_as_one_with_twice_the_batch(two, ours, theirs):
    assert len(freezes(two / theirs)) >= 4
    assert_same_run(two / ours, two / theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_images_on_no_rank_or_on_one_alone_leave_nobody_waiting(two, kind):
    """And the weights that see images stay as they are, to weight decay, in a step without any."""
    a, b = weights(two / f"sparse_{kind}"), weights(two / "sparse")
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3, msg=name)
    assert lines(two / f"sparse_{kind}", "train/loss") == pytest.approx(lines(two / "sparse", "train/loss"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_question_of_a_benchmark_is_answered_once(two, kind):
    """And evaluate.py finds the same number for the weights at the end."""
    folder = two / f"{kind}_tasks"
    [of_rows] = json.loads((folder / "summary.json").read_text())["eval_tasks"].values()
    assert of_rows["rows"] == 18  # two turns a row
    rows = folder.parent / f"{kind}_questions" / "rows"
    flags = ["--checkpoint", folder / "checkpoints" / "last", "--tasks", rows, "--output", folder / "result"]
    evaluate.main(evaluate.parse_arguments([*map(str, flags), "--num_workers", "0", "--dtype", "float32"]))
    [expected] = json.loads((folder / "result" / "results.json").read_text())["tasks"].values()
    assert of_rows["rules"] == expected["rules"]
    assert len(lines(folder, "eval/rows/accuracy")) == 2


@pytest.mark.slow
def test_sharded_weights_are_probed_and_wake(two):
    assert any(event.get("unfrozen") for event in history(two / "fsdp_woken")["events"])


@pytest.mark.slow
def test_metrics_come_from_the_shards_of_all_ranks(two):
    for ours, theirs, tolerance in (("fsdp", "one", 1e-3), ("fsdp_sampled", "one_norm", 0.5)):
        a, b = (history(two / name)["checks"][:3] for name in (ours, theirs))
        a, b = ([value for check in checks for value in check["values"]] for checks in (a, b))
        assert [value is None for value in a] == [value is None for value in b]
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_go_on_exactly_where_they_were(two, kind):
    whole, resumed = weights(two / kind), weights(two / f"{kind}_resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert freezes(two / kind) == freezes(two / f"{kind}_resumed")


@pytest.mark.slow
def test_each_process_writes_its_part_of_the_optimizer(two, tmp_path):
    """Some half of each tensor; together they are what a single process has."""
    folder = step_4(two / "fsdp")
    parts = [load_file(path) for path in sorted((folder / "optimizer").iterdir())]
    assert len(parts) == 2
    whole = torch.load(step_4(two / "one") / "training_state.pt", weights_only=True)["optimizer"]["state"]
    wanted = [value for state in whole.values() for value in state.values()]
    assert sum(value.numel() for part in parts for value in part.values()) == sum(value.numel() for value in wanted)
    assert sum(value.abs().sum() for part in parts for value in part.values()) == pytest.approx(
        float(sum(value.abs().sum() for value in wanted)), rel=1e-3
    )
    name = "decoder.blocks.0.mlp.up_proj.weight.exp_avg"
    assert [part[name].shape for part in parts] == [(16, 16)] * 2
    saved = torch.load(folder / "training_state.pt", weights_only=True)
    assert saved["optimizer"].keys() == {"param_groups"}
    assert {path.name for path in folder.iterdir()} >= {"shard_0.pt", "shard_1.pt"}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sum(file.startswith("optimizer/") for file in files) == 2
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    assert damage(copied) is None
    path = next((copied / "optimizer").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert damage(copied) == f"optimizer/{path.name} is not what was written"
    tied = {"decoder.head.weight", "decoder.token_embedding.weight"}
    assert len(tied & weights(two / "fsdp").keys()) == 1  # stored once


@pytest.mark.slow
def test_a_part_that_cannot_be_written_leaves_no_checkpoint(two):
    """Rank 1 has no room for its part of the optimizer at step 2, nor of what the metric keeps at step 4."""
    log = (two / "full_disk" / "log.txt").read_text()
    for step in (2, 4):
        assert f"NOT SAVED: step_0000000{step} could not be written ([Errno 28] No space left on device)" in log
    assert log.count("NOT SAVED") == 2
    names = {path.name for path in (two / "full_disk" / "checkpoints").iterdir()}
    assert names - {"best", "last"} == {"step_00000006", "step_00000007"}  # where all was frozen


def goes_on(two: Runs, name: str, whole: str, **flags) -> Path:
    """A run of one process from step 4 of another."""
    assert train.main(parse_arguments(arguments(two / "rows", name, resume=step_4(two / whole), **flags))) == 0
    return two / name


@pytest.mark.slow
def test_another_number_of_processes_goes_on_as_the_same_run(two):
    """Two processes where there was one, with shards where there were none; and one where there were two."""
    assert_same_run(goes_on(two, "ddp_on_one", "ddp", batch_size=4), two / "ddp")
    log = (two / "ddp_on_one" / "log.txt").read_text()
    assert "processes: 1 now, 2 before" in log
    assert "--batch_size" not in log
    for ours, theirs in (
        (two / "one_on_two", "one"),
        (goes_on(two, "fsdp_on_one", "fsdp", batch_size=4, parallel="fsdp"), "fsdp"),
    ):
        found, wanted = history(ours), history(two / theirs)
        assert (
            [event for event in found["events"] if event["step"] <= 4]
            == [event for event in wanted["events"] if event["step"] <= 4]
            != []
        )
        assert found["checks"][:4] == wanted["checks"][:4]
        assert set(found["checks"][4]["values"]) == {None}  # the weights of step 4 were kept as other shards
        assert any(value is not None for value in found["checks"][5]["values"])
        assert not any(event["step"] == 5 for event in found["events"])
        assert lines(ours, "train/loss") == pytest.approx(lines(two / theirs, "train/loss"), rel=1e-2)
        a, b = (json.loads((folder / "summary.json").read_text()) for folder in (ours, two / theirs))
        assert (a["train_tokens"], a["dropped"], a["steps"]) == (b["train_tokens"], b["dropped"], b["steps"])


@pytest.mark.slow
def test_rollback_gains_need_no_shards_of_before(two):
    ours = goes_on(two, "fsdp_rollback_on_one", "fsdp_rollback", batch_size=4, parallel="fsdp", **ROLLBACK)
    assert_same_run(ours, two / "fsdp_rollback")
    assert any(value is not None for value in history(ours)["checks"][4]["values"])


@pytest.mark.slow
def test_another_global_batch_is_another_run(two, capsys):
    rows = two / "rows"
    assert train.main(parse_arguments(arguments(rows, "alone", resume=step_4(two / "fsdp"), parallel="fsdp"))) == 2
    said = capsys.readouterr().err
    assert "--batch_size 2, processes 1: the run that is resumed has 2 processes; the product must be 4" in said
    assert "--resume_override continues" in said
    assert not (two / "alone").exists()
    folder = goes_on(two, "alone", "fsdp", parallel="fsdp", resume_override=True)
    state = torch.load(step_4(folder).with_name("step_00000006") / "training_state.pt", weights_only=True)
    assert state["states"]["data"][0]["position"] == 2 * (4 * 2) + 2 * 2  # in half as large batches, two a step


@pytest.mark.slow
def test_three_processes_share_rows_that_do_not_divide_evenly(two, tmp_path):
    """Seven rows to train on, nine in a global batch: it goes on into the next epoch. And three processes go on with
    the shards of two."""
    rows = write_rows(tmp_path / "rows", 9, text=some_texts)
    flags = {"val_size": 2, "gradient_accumulation_steps": 1, "max_training_steps": 4, "eval_interval": 4}
    resumed = {"parallel": "fsdp", "batch_size": 2, "resume": step_4(two / "six")} | THRICE
    run_together(
        3,
        [arguments(rows, "three", batch_size=3, **flags), arguments(two / "rows", "six_on_three", **resumed)],
        tmp_path,
    )
    assert train.main(parse_arguments(arguments(rows, "one", batch_size=9, **flags))) == 0
    assert_same_run(tmp_path / "three", tmp_path / "one")
    steps = [step for step, _ in freezes(two / "six")]
    assert min(steps) <= 4 < max(steps)
    assert_same_run(two / "six_on_three", two / "six")
    assert len(list((two / "six_on_three" / "checkpoints" / "last" / "optimizer").iterdir())) == 3


def start_long_run(tmp_path: Path) -> subprocess.Popen:
    """Two processes in the middle of training."""
    flags = arguments(
        write_rows(tmp_path / "rows", 16, text=some_texts), "run", max_training_steps=100_000, eval_interval=100_000,
        checkpoint_interval=0, vision_tau=1e-9, language_tau=1e-9,
    )  # fmt: skip
    process = torchrun(2, "train.py", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(1200):
        if (tmp_path / "run" / "metrics.jsonl").exists() and lines(tmp_path / "run", "train/loss"):
            break
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_one_killed_process_ends_the_others(tmp_path):
    process = start_long_run(tmp_path)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_a_signal_ends_all_processes_with_everything_saved(tmp_path):
    process = start_long_run(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stop_reason"] == "interrupted"
    assert (tmp_path / "run" / "convergence.png").exists()
    state = torch.load(tmp_path / "run" / "checkpoints" / "last" / "training_state.pt", weights_only=True)
    assert state["step"] == summary["steps"] > 0
    assert len({own["position"] for own in state["states"]["data"]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nanovlm", "molmo2"])
def test_activation_checkpointing_changes_no_number(tmp_path, monkeypatch, family):
    from models.language_model import LanguageModelMLP

    rows = write_rows(tmp_path / "rows", 16, text=some_texts, sizes=SIZES)
    calls, real = [], LanguageModelMLP.forward
    monkeypatch.setattr(
        LanguageModelMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or real(self, x)
    )
    found = []
    for name, on in (("plain", False), ("checkpointed", True)):
        calls.clear()
        flags = {"activation_checkpointing": on, "lm_dropout": 0.1} | FAMILIES[family]
        assert train.main(parse_arguments(arguments(rows, name, **flags))) == 0
        found.append(sum(calls))
    assert found[1] > found[0]
    plain, checkpointed = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
