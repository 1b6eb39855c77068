"""What scripts for the authors' package 1.0.6 do, with this one: imports, settings, attributes, files, wandb."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny.grades import ALWAYS, NEVER, Loop, make_model, train

import grades
from grades import GradESConfig, compat

STATS = {"name", "component_type", "frozen", "frozen_at_step", "change_history", "weight_cache",
         "total_change_accumulated", "param_count"}  # fmt: skip
KINDS = ["attn_q_proj", "attn_k_proj", "attn_v_proj", "attn_o_proj", "mlp_gate_proj", "mlp_up_proj", "mlp_down_proj"]


@pytest.fixture
def wandb(monkeypatch):
    """As much of wandb as a run has: it keeps what it is given."""
    kept = SimpleNamespace(run=object(), logs=[], settings={})
    kept.log = kept.logs.append
    kept.config = SimpleNamespace(update=lambda values, allow_val_change: kept.settings.update(values))
    monkeypatch.setitem(sys.modules, "wandb", kept)
    return kept


def test_their_modules_hold_their_names(hf):
    names = {
        "grades": "GradEarlyStoppingCallback GradEarlyStoppingConfig ComponentStats VLMGradEarlyStoppingCallback "
        "VLMGradEarlyStoppingConfig VLMComponentStats __version__",
        "grades.gradient_early_stopping": "GradEarlyStoppingCallback GradEarlyStoppingConfig ComponentStats "
        "ATTENTION_COMPONENTS MLP_COMPONENTS",
        "grades.vlm_early_stopping": "VLMGradEarlyStoppingCallback VLMGradEarlyStoppingConfig VLMComponentStats "
        "create_vlm_freeze_config VISION_COMPONENTS LANGUAGE_ATTENTION_COMPONENTS LANGUAGE_MLP_COMPONENTS",
    }
    for module, held in names.items():
        for name in held.split():
            found = getattr(importlib.import_module(module), name)
            assert getattr(grades, name, found) is found, "one class, wherever it is imported from"
    assert {field.name for field in fields(grades.ComponentStats)} == STATS
    assert {field.name for field in fields(grades.VLMComponentStats)} == STATS | {"module_type", "layer_index"}
    config = compat.create_vlm_freeze_config(vision_tau=1e-3, enable_wandb=True)
    assert (config.vision_tau, config.language_tau, config.alpha, config.enable_wandb_logging) == (
        1e-3,
        1e-4,
        0.3,
        True,
    )
    assert (
        grades.GradEarlyStoppingConfig(target_components=compat.ATTENTION_COMPONENTS).target_components[0] == "q_proj"
    )


def test_the_notebooks_settings_are_taken_without_a_warning(hf, recwarn):
    from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

    config = GradEarlyStoppingConfig(
        tau=1e-10,
        alpha=0.90,
        enable_wandb_logging=True,
        log_interval=5,
        save_stats=True,
        max_frozen_ratio=0.8,
    )
    callback = GradEarlyStoppingCallback(config)
    assert (config.tau, config.alpha, config.max_frozen_ratio, config.enable_wandb_logging) == (1e-10, 0.9, 0.8, True)
    assert not recwarn
    assert (callback.component_stats, callback.frozen_components, callback.frozen_events) == ({}, set(), [])
    assert (callback.initialized, callback.mode, callback.all_components_frozen_at_step) == (False, None, None)
    assert callback.current_training_step == callback.total_training_steps == 0


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_results_are_read_as_their_notebooks_read_them(hf, tmp_path, lora):
    _, callback = hf.run(tmp_path, hf.settings(compute_interval=2), hf.llama(lora))
    assert hasattr(callback, "component_stats")
    total_components = len(callback.component_stats)
    frozen_components = sum(1 for stats in callback.component_stats.values() if stats.is_frozen)
    frozen_names = [name for name, stats in callback.component_stats.items() if stats.is_frozen]
    assert (total_components, frozen_components) == (hf.MATRICES, 8)
    assert frozen_names == [f"layer_{layer:02d}_{kind}" for layer in range(hf.LAYERS) for kind in KINDS[:4]]
    assert list(callback.component_stats) == [f"layer_{layer:02d}_{kind}" for layer in range(2) for kind in KINDS]
    assert callback.frozen_components == set(frozen_names)
    assert callback.mode == ("full" if lora is None else "lora")
    assert (callback.current_training_step, callback.total_training_steps) == (12, 12)
    assert (callback.initialized, callback.all_components_frozen_at_step) == (True, None)
    stats = callback.component_stats["layer_00_attn_q_proj"]
    assert (stats.component_type, stats.frozen, stats.frozen_at_step) == (callback.mode, True, 6)
    assert stats.param_count == (32 * 32 if lora is None else 2 * 4 * 32)
    assert [step for step, _ in stats.change_history] == [4, 6]
    assert stats.total_change_accumulated == sum(change for _, change in stats.change_history) > 0
    event = {"step": 6, "component": "layer_00_attn_q_proj", "mode": callback.mode, "param_count": stats.param_count}
    assert callback.frozen_events[0] == event
    assert len(callback.frozen_events) == 8
    assert callback.component_stats is callback.component_stats, "made once for each state of the run"


def test_a_run_in_which_everything_froze_names_the_step(hf, tmp_path):
    _, callback = hf.run(tmp_path, grades.GradEarlyStoppingConfig(tau=ALWAYS, alpha=0.5, save_stats=False))
    assert callback.all_components_frozen_at_step == callback.current_training_step == 7
    assert len(callback.frozen_components) / len(callback.component_stats) == 1


def test_their_files_are_written_on_demand(hf, tmp_path):
    config = hf.settings(save_freezing_history=True, output_dir=str(tmp_path / "out"))
    _, callback = hf.run(tmp_path, config)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written > {"dynamic_freezing_history.json", "freezing_summary.txt", "grades_history.json"}
    saved = json.loads((tmp_path / "out" / "dynamic_freezing_history.json").read_text())
    assert set(saved) == {
        "metadata", "config", "summary", "freezing_timeline", "component_details", "performance_metrics"
    }  # fmt: skip
    assert set(saved["config"]) == {"tau", "alpha", "max_frozen_ratio", "compute_interval", "target_components"}
    summary = saved["summary"]
    assert (summary["final_frozen_count"], summary["total_components"], summary["frozen_percentage"]) == (
        8,
        14,
        "57.1%",
    )
    assert summary["training_completion"] == "100.0%"
    assert summary["component_breakdown"]["attn_q"] == {"total": 2, "frozen": 2}
    assert summary["component_breakdown"]["mlp_up"] == {"total": 2, "frozen": 0}
    assert saved["freezing_timeline"] == {"total_events": 8, "events": callback.frozen_events}
    detail = saved["component_details"]["layer_01_attn_v_proj"]
    assert (detail["frozen_at_step"], detail["frozen_at_progress"], detail["param_count_formatted"]) == (
        5,
        "41.7%",
        "512",
    )
    assert saved["performance_metrics"]["frozen_parameters"] == 2 * (2 * 1024 + 2 * 512)
    text = (tmp_path / "out" / "freezing_summary.txt").read_text()
    assert "8 of 14" in text
    assert "layer_00_attn_k_proj" in text


def test_wandb_gets_their_keys_every_log_interval_steps(hf, tmp_path, wandb):
    _, callback = hf.run(tmp_path, hf.settings(enable_wandb_logging=True, log_interval=3, compute_interval=2))
    assert [log["train/global_step"] for log in wandb.logs] == [4, 6, 10, 12]
    spread = {f"GradES/changes/{name}" for name in ("mean", "max", "min", "std", "median", "p25", "p75")}
    shares = {f"GradES/global/{name}" for name in ("frozen_components", "frozen_ratio", "total_components")}
    assert set(wandb.logs[-1]) == {"train/global_step"} | spread | shares
    assert (wandb.logs[0]["GradES/global/frozen_components"], wandb.logs[1]["GradES/global/frozen_ratio"]) == (
        0,
        8 / 14,
    )
    values = [stats.change_history[-1][1] for stats in callback.component_stats.values() if not stats.is_frozen]
    assert wandb.logs[-1]["GradES/changes/max"] == max(values)
    assert wandb.settings["grades_alpha"] == 0.3
    assert wandb.settings["grades_mode"] == "full"
    assert callback.wandb_available


def test_without_a_wandb_run_there_is_one_warning(hf, tmp_path, wandb, caplog):
    wandb.run = None
    _, callback = hf.run(tmp_path, hf.settings(enable_wandb_logging=True, log_interval=1))
    assert sum("enable_wandb_logging" in line for line in caplog.messages) == 1
    assert not wandb.logs
    assert not callback.wandb_available


class Watcher(compat.AuthorsInterface):
    """The attributes of a callback without a trainer."""

    def __init__(self, monitor, **config):
        self.monitor, self.config = monitor, SimpleNamespace(**vars(monitor.config) | config)
        self.begin_record()


def test_the_total_of_changes_is_of_all_checks_also_of_a_thinned_history_and_a_resumed_run():
    config = {"vision_tau": NEVER, "language_tau": NEVER, "alpha": 0.0}
    whole, short = (Loop(make_model(), GradESConfig(**config, history_maxlen=n), 12) for n in (1000, 3))
    checkpoint = short.run(until=7).save()
    resumed = Loop(make_model(), short.monitor.config, 12).load(checkpoint).run()
    stats, expected = (Watcher(loop.monitor).component_stats for loop in (resumed, whole.run()))
    for key, one in expected.items():
        assert len(stats[key].change_history) <= 3 < len(one.change_history)
        assert one.total_change_accumulated == pytest.approx(sum(change for _, change in one.change_history))
        assert stats[key].total_change_accumulated == one.total_change_accumulated > 0


def test_towers_have_their_own_keys_and_numbers(tmp_path):
    config = {"vision_tau": ALWAYS, "language_tau": NEVER, "alpha": 0.5}
    watcher = Watcher(train(config, 4).monitor)
    stats = watcher.component_stats["vision_L01_attn_qkv_proj"]
    assert (stats.component_type, stats.module_type, stats.layer_index) == ("vision", "full", 1)
    assert watcher.component_stats["language_L00_mlp_up_proj"].frozen is False
    assert {key.partition("_")[0] for key in watcher.frozen_components} == {"vision"}
    assert watcher.frozen_events[0]["component_type"] == "vision"
    metrics = watcher.wandb_metrics()
    assert metrics["VLMGradES/vision/frozen_ratio"] == 1
    assert metrics["VLMGradES/language/frozen"] == 0
    assert (metrics["VLMGradES/global/total_frozen"], metrics["VLMGradES/global/frozen_this_step"]) == (8, 0)
    language = [v for n, v in watcher.monitor.latest.items() if watcher.monitor.by_name[n].tower == "language"]
    assert metrics["VLMGradES/language/avg_change"] == pytest.approx(sum(language) / len(language))
    assert "VLMGradES/vision/avg_change" not in metrics, "nothing was measured there"
    watcher.write_files(tmp_path)
    saved = json.loads((tmp_path / "vlm_dynamic_freezing_history.json").read_text())
    assert saved["summary"]["component_breakdown"]["vision"] == {"total": 8, "frozen": 8}
    assert (tmp_path / "vlm_freezing_summary.txt").exists()


def test_keys_are_never_shared():
    from torch import nn

    block = {name: nn.ModuleDict({"up_proj": nn.Linear(4, 4)}) for name in ("0", "1")}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleDict(block)})])})
    names = [component.name for component in grades.find_components(model)]
    assert len(names) == 2
    assert list(compat.component_keys(grades.find_components(model), False).values()) == names
    keys = compat.component_keys(grades.find_components(make_model()), True)
    assert len(set(keys.values())) == len(keys)


AUTHORS = os.environ.get("AUTHORS_GRADES")  # the folder that their wheel was unpacked in
RUN = """
import json, sys, torch, transformers, grades
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
if sys.argv[1] == "lora":
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (48, 12)).tolist()]
ours = {"freeze_prefix": False, "save_stats": False} if hasattr(grades.GradEarlyStoppingConfig, "metric") else {}
callback = grades.GradEarlyStoppingCallback(grades.GradEarlyStoppingConfig(
    tau=float(sys.argv[2]), alpha=0.25, compute_interval=2, save_freezing_history=True, output_dir="out", **ours
))
arguments = TrainingArguments(
    "run", max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="linear", report_to=[],
    use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0,
)
Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
changes = {
    key: [(step, round(value, 2)) for step, value in stats.change_history if value > 0]
    for key, stats in callback.component_stats.items()
}
steps = [callback.current_training_step, callback.total_training_steps, callback.all_components_frozen_at_step]
print(json.dumps([sorted(callback.frozen_components), callback.frozen_events, changes, callback.mode, steps]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not AUTHORS, reason="AUTHORS_GRADES names no folder with the authors' package")
@pytest.mark.parametrize(("method", "tau"), [("full", "4"), ("lora", "1")])
def test_both_packages_give_the_same_run(tmp_path, method, tau):
    printed, files = [], []
    for name, home in (("theirs", AUTHORS), ("ours", str(Path(__file__).resolve().parents[1]))):
        (folder := tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", RUN, method, tau], cwd=folder, env=os.environ | {"PYTHONPATH": home},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout.splitlines()[-1]))
        files.append(json.loads((folder / "out" / "dynamic_freezing_history.json").read_text()))
    assert printed[0] == printed[1]
    assert len({event["step"] for event in printed[0][1]}) > 1, "they froze one after the other"
    for saved in files:
        for timed in ("total_time_seconds", "total_time_formatted"):
            del saved["summary"][timed]
        del saved["metadata"], saved["config"]["target_components"]
        del saved["performance_metrics"]["avg_time_per_component"]
        for detail in saved["component_details"].values():
            detail["total_change_accumulated"] = round(detail["total_change_accumulated"], 1)
    assert files[0] == files[1]
