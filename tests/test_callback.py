"""The callbacks in transformers.Trainer: what they measure, freeze, log, save and resume."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from tiny.grades import ALWAYS, NEVER
from tiny.processes import SHARDED, claim_gpus, run_two_ranks

import grades
from grades import GradEarlyStoppingConfig, GradESConfig, VLMGradEarlyStoppingConfig


@pytest.mark.parametrize(
    ("metric", "max_grad_norm", "lora"),
    [
        ("weight_change", 0.01, None),
        ("weight_change", 0.01, {}),
        ("gradient_change", 0.01, None),
        ("gradient_change", 0.0, {}),
        ("gradient_norm", 0.0, None),
        ("gradient_norm", 0.01, {}),
    ],
)
def test_each_metric_is_what_a_slow_computation_says(hf, tmp_path, metric, max_grad_norm, lora):
    watcher = hf.Weights()
    trainer, callback = hf.run(
        tmp_path, hf.never(metric=metric, compute_interval=2), hf.llama(lora), [watcher], hf.SlowTrainer,
        max_steps=6, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    monitor = callback.monitor
    assert len(monitor.components) == hf.MATRICES
    assert [check["step"] for check in monitor.checks] == [2, 4, 6]
    series = watcher.at if metric == "weight_change" else trainer.seen
    before = {"weight_change": 2, "gradient_change": 1, "gradient_norm": 0}[metric]
    for check in monitor.checks[before // 2 :]:  # the first look at a weight is no measurement
        for component, value in zip(monitor.components, check["values"], strict=True):
            names = hf.matrices(trainer.model, component.name)
            assert len(names) == (1 if lora is None else 2)
            now, then = series[check["step"]], series.get(check["step"] - before)
            slow = sum((now[name] - then[name] if before else now[name]).abs().sum().item() for name in names)
            assert value == pytest.approx(slow, rel=1e-5), component.name


REENTRANT = {
    how: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": how}}
    for how in (False, True)
}


@pytest.mark.parametrize(
    ("model", "config", "others"),
    [
        ({}, {}, {}),
        ({"lora": {}}, {}, {}),
        ({"lora": {"use_dora": True}}, {}, {"gradient_accumulation_steps": 2}),
        ({"lora": {"use_rslora": True}}, {}, {"gradient_accumulation_steps": 2}),
        ({"lora": {}, "quantized": True}, {}, {}),
        ({"lora": {}, "quantized": "nf4"}, {}, {}),
        ({"lora": {}, "quantized": "int8"}, {}, {}),
        ({}, {}, REENTRANT[False] | {"gradient_accumulation_steps": 2}),
        ({}, {}, REENTRANT[True]),
        ({"lora": {}}, {}, REENTRANT[True] | {"gradient_accumulation_steps": 2}),
        ({}, {}, {"bf16": True}),
        pytest.param(
            {}, {"freeze_rounds": 2}, {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "full", "lora", "dora", "rslora", "quantized", "nf4", "int8", "checkpointing", "reentrant", "lora, reentrant",
        "bf16", "compile",
    ],
)  # fmt: skip
def test_what_is_frozen_never_moves_and_the_rest_does(hf, tmp_path, model, config, others):
    if model.get("quantized") in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    trainer, callback = hf.check_freezing(tmp_path, lambda: hf.llama(**model), hf.settings(**config), **others)
    assert set(callback.monitor.frozen.values()) == {5}
    assert trainer.state.global_step > 5


@pytest.mark.parametrize(
    ("metric", "others"),
    [("weight_change", {}), ("gradient_change", {"gradient_accumulation_steps": 2, "bf16": True})],
    ids=["weight_change", "gradient_change, bf16"],
)
def test_a_run_that_freezes_nothing_is_bit_for_bit_the_run_without(hf, tmp_path, metric, others):
    without, _ = hf.run(tmp_path, **others)
    random_state = torch.get_rng_state()
    trainer, callback = hf.run(tmp_path, hf.never(metric=metric), **others)
    assert len(callback.monitor.checks) == 12
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hf.same(trainer.model, without.model)
    ours, theirs = trainer.state.log_history[0], without.state.log_history[0]
    assert {key: ours[key] for key in theirs} == theirs


RESUMED = {
    "weights from between two saves": {"compute_interval": 2, "language_mlp_tau": None, "tau": "auto"},
    "gradient of the step before": {"metric": "gradient_change"},
    "peaks and streaks": {"tau_mode": "relative", "tau": 1.0, "language_attention_tau": 1.0, "patience": 2},
}


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(hf, tmp_path, config):
    config = hf.settings(**config)
    saving = {"save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "cosine", "logging_steps": 1}
    whole, first = hf.run(tmp_path / "a", config, **saving)
    early = [name for name, step in first.monitor.frozen.items() if step <= 7]
    assert 0 < len(early) < hf.MATRICES, "the checkpoint holds frozen matrices, and some that train on"
    resumed, second = hf.run(tmp_path / "b", config, resume=str(tmp_path / "a" / "checkpoint-7"), **saving)
    assert second.monitor.history() == first.monitor.history()
    assert hf.same(resumed.model, whole.model)
    logs = [
        [{k: v for k, v in log.items() if "train" not in k} for log in trainer.state.log_history[:-1]]
        for trainer in (resumed, whole)
    ]
    assert logs[0] == logs[1]


def test_trainer_state_alone_brings_back_what_is_frozen(hf, tmp_path, caplog):
    """As after save_only_model, or with another number of sharded ranks."""
    _, first = hf.run(tmp_path, hf.settings(), save_strategy="steps", save_steps=7)
    checkpoint = tmp_path / "checkpoint-7"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["GradEarlyStoppingCallback"]["attributes"]["saved_state"]["frozen"] == first.monitor.frozen
    (checkpoint / "grades_state.pt").unlink()
    watcher = hf.Weights()
    resuming = {"resume": str(checkpoint), "restore_callback_states_from_checkpoint": True}
    resumed, _ = hf.run(tmp_path, hf.settings(), watchers=[watcher], **resuming)
    second = next(c for c in resumed.callback_handler.callbacks if hasattr(c, "monitor"))  # made from that state
    assert second.monitor.frozen == first.monitor.frozen
    assert not {f"{name}.weight" for name in first.monitor.frozen} & watcher.trains[8]
    assert "grades_state.pt" in caplog.text


def test_a_checkpoint_without_grades_freezes_nothing_before_it_was_measured(hf, tmp_path, caplog):
    hf.run(tmp_path, save_strategy="steps", save_steps=7)
    _, callback = hf.run(tmp_path, hf.settings(), resume=str(tmp_path / "checkpoint-7"))
    assert "checkpoint-7 holds no state" in caplog.text
    assert set(callback.monitor.checks[0]["values"]) == {None}
    assert set(callback.monitor.frozen.values()) == {9}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_run_ends_at_max_frozen_ratio_and_stays_ended(hf, tmp_path, accumulation, caplog):
    config = hf.settings(max_frozen_ratio=0.25)
    given = {"save_strategy": "steps", "save_steps": 100, "gradient_accumulation_steps": accumulation}
    trainer, callback = hf.run(tmp_path, config, **given)
    assert trainer.state.global_step == 5
    assert callback.monitor.history()["stopped_early"]
    assert trainer.state.log_history[-1]["grades/frozen_share"] >= 0.25
    assert "step 5 of 12, as 8 of 14" in caplog.text
    again, _ = hf.run(tmp_path, config, resume=str(tmp_path / "checkpoint-5"), **given)
    assert again.state.global_step <= 6
    assert hf.same(again.model, trainer.model)


def test_logs_hold_the_frozen_share_and_the_mean(hf, tmp_path, caplog):
    caplog.set_level("INFO", logger="grades")
    trainer, callback = hf.run(tmp_path, hf.settings())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    checks = {check["step"]: check["values"] for check in callback.monitor.checks}
    for log in logs:
        assert log["grades/frozen_share"] == (8 / 14 if log["step"] >= 5 else 0)
        values = [value for value in checks[log["step"]] if value is not None]
        assert log["grades/weight_change_language_mean"] == pytest.approx(sum(values) / len(values))
    assert [record.message for record in caplog.records if "froze " in record.message] == [
        "step 5: froze 8 of 14 language matrices (8 frozen): tau 1e+09"
    ]


def test_total_steps_by_epochs(hf, tmp_path):
    _, callback = hf.run(tmp_path, hf.settings(alpha=0.5), max_steps=-1, num_train_epochs=2)
    assert callback.monitor.total_steps == 2 * hf.ROWS // 4
    assert callback.monitor.grace_steps == 12


def test_two_runs_of_one_trainer(hf, tmp_path):
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    given = hf.TrainingArguments(**hf.arguments(tmp_path))
    trainer = hf.Trainer(model=hf.llama(), args=given, train_dataset=hf.rows(), callbacks=[callback])
    for _ in range(2):
        trainer.train()
        assert callback.monitor.last_step == 12
        assert callback.monitor.frozen
        assert "log" not in vars(trainer)
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_gradients_that_cannot_be_seen_before_clipping_are_an_error(hf, tmp_path):
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        hf.run(tmp_path, hf.settings(metric="gradient_norm"), trainer=hf.ClipsItself)
    _, callback = hf.run(tmp_path, hf.settings(), trainer=hf.ClipsItself)
    assert callback.monitor.frozen


def test_a_vlm_has_a_tau_for_each_tower(hf, tmp_path):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(0)
    blocks = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Idefics3Config(
        vision_config=blocks | {"num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        text_config=blocks
        | {"model_type": "llama", "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        scale_factor=2, image_token_id=63, pad_token_id=0,
    )  # fmt: skip
    images = torch.rand(hf.ROWS, 1, 3, 16, 16)
    data = []
    for row, pixels in zip(hf.rows(), images, strict=True):
        ids = [i % 60 for i in row["input_ids"][:8]]
        data.append({"input_ids": [63] * 4 + ids, "pixel_values": pixels, "labels": [-100] * 4 + ids})
    model = Idefics3ForConditionalGeneration(config)
    config = VLMGradEarlyStoppingConfig(vision_tau=ALWAYS, language_tau=NEVER, alpha=0.5, save_stats=False)
    callback, watcher = grades.VLMGradEarlyStoppingCallback(config), hf.Weights()
    given = hf.TrainingArguments(**hf.arguments(tmp_path, max_steps=8))
    hf.Trainer(model=model, args=given, train_dataset=data, callbacks=[callback, watcher]).train()
    vision = {component.name for component in callback.monitor.components if component.tower == "vision"}
    assert len(vision) == 12
    assert callback.monitor.frozen == dict.fromkeys(callback.monitor.frozen, 5)
    assert set(callback.monitor.frozen) == vision
    for name, weight in watcher.at[8].items():  # norms and embeddings of the tower stop with its last matrix
        assert torch.equal(weight, watcher.at[5][name]) == ("vision_model" in name), name


DISTRIBUTED = {
    # A reducer that waits for every gradient that there was when it was made.
    "strict": ({}, None, {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}),
    "lora": ({"metric": "gradient_norm"}, {}, {"gradient_checkpointing": True}),
    "sharded": ({"compute_interval": 2}, None, SHARDED),
}  # fmt: skip


def one_rank(rank, port, folder, case):
    """In a process of its own: a run, one that resumes it, and what came out of both."""
    from tiny import trainer as hf

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config, lora, others = DISTRIBUTED[case]
    others = others | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    others |= {"save_strategy": "steps", "save_steps": 7}
    if "fsdp" in others:
        claim_gpus()
        others["fsdp"] = "full_shard" if hf.OLDEST else True
    watcher = hf.Weights()
    trainer, callback = hf.run(folder, hf.settings(**config), hf.llama(lora), [watcher], **others)
    if not hf.OLDEST:  # which cannot load an optimizer on several CPU ranks
        others["resume"] = str(folder / "checkpoint-7")
    resumed, again = hf.run(folder, hf.settings(**config), hf.llama(lora), **others)
    found = {
        "world": trainer.args.world_size, "rounds": callback.monitor.freezer.rounds_done,
        "moved": watcher.moved(trainer.model, callback.monitor.frozen),
        "checks": callback.monitor.checks, "frozen": callback.monitor.frozen, "frozen_again": again.monitor.frozen,
    }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.save([hf.weights(trainer.model), hf.weights(resumed.model)], folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", DISTRIBUTED)
def test_two_ranks_freeze_as_one_does(hf, tmp_path, monkeypatch, case):
    run_two_ranks(monkeypatch, "tiny.trainer", one_rank, tmp_path, case)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
    assert not first["moved"]
    assert 0 < len(first["frozen"]) < hf.MATRICES
    assert 0 < first["rounds"] <= 8
    assert first["frozen_again"] == first["frozen"]
    (ours, resumed), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, weight in ours.items():
        assert torch.equal(others[name], weight), name
        assert torch.equal(resumed[name], weight), name
    config, lora, given = DISTRIBUTED[case]
    given = {name: value for name, value in given.items() if "fsdp" not in name}
    _, alone = hf.run(tmp_path / "alone", hf.settings(**config), hf.llama(lora), **given)
    for here, there in zip(alone.monitor.checks[1:4], first["checks"][1:4], strict=True):
        assert [value is None for value in there["values"]] == [value is None for value in here["values"]]
        pairs = [pair for pair in zip(here["values"], there["values"], strict=True) if None not in pair]
        assert [there for _, there in pairs] == pytest.approx([here for here, _ in pairs], rel=1e-3)


def test_options_of_the_authors_package_are_taken_with_its_defaults():
    llm, vlm = GradEarlyStoppingConfig(), VLMGradEarlyStoppingConfig()
    common = {
        "metric": "weight_change", "tau_mode": "absolute", "patience": 1, "alpha": 0.3, "max_frozen_ratio": 1.0,
        "compute_interval": 1, "history_maxlen": 1000, "log_interval": 10, "output_dir": "./grades_output",
        "save_stats": True, "save_freezing_history": False,
    }  # fmt: skip
    assert vars(llm).items() >= (common | {"tau": 1e-4}).items()
    assert llm.vision_tau == llm.language_tau == 1e-4
    towers = {"vision_tau": 1e-5, "language_tau": 1e-4, "freeze_vision": True, "freeze_language": True}
    assert {key: vars(vlm)[key] for key in common | towers} == common | towers


def test_options_without_effect_are_named_in_one_warning(hf):
    ignored = {"auto_detect_mode": False, "use_cuda_acceleration": False}
    config = GradEarlyStoppingConfig(target_components=None, save_freezing_history=True, output_dir=None, **ignored)
    with pytest.warns(UserWarning, match="without effect") as warned:
        grades.GradEarlyStoppingCallback(config)
    assert len(warned) == 1
    assert all(name in str(warned[0].message) for name in ignored)


def test_impossible_settings_are_named_before_training(hf):
    with pytest.raises(ValueError, match=r"alpha 1(.|\n)*tau -1"):
        grades.GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=-1, alpha=1))
    with pytest.raises(ValueError, match=r"^vision_tau 0"):
        grades.VLMGradEarlyStoppingCallback(GradESConfig(vision_tau=0))
    with pytest.raises(TypeError, match="language_tau"):
        GradEarlyStoppingConfig(language_tau=1.0)


def test_what_cannot_freeze_is_an_error_at_the_start_of_training(hf):
    from accelerate.utils import DistributedType

    from grades.callback import check_parallelism

    def accelerator(kind, is_fsdp2=False):
        return SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2)

    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        with pytest.raises(ValueError, match=kind.value):
            check_parallelism(accelerator(kind), None)
    check_parallelism(accelerator(DistributedType.FSDP, is_fsdp2=True), None)
    with pytest.raises(ValueError, match="ddp_static_graph"):
        check_parallelism(accelerator(DistributedType.MULTI_GPU), SimpleNamespace(static_graph=True))
    with pytest.raises(ValueError, match="Trainer only"):
        grades.GradEarlyStoppingCallback().on_train_begin(None, None, None)


def test_the_history_and_the_pictures_are_written_at_the_end_and_the_history_with_each_checkpoint(hf, tmp_path):
    config = hf.settings(save_stats=True, output_dir=str(tmp_path / "out"), history_maxlen=5)
    _, callback = hf.run(tmp_path, config, save_strategy="steps", save_steps=7)
    written = {"grades_history.json", "convergence.png", "freezing.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    assert [check["step"] for check in callback.monitor.checks] == [4, 8, 12]
    histories = [tmp_path / "out", tmp_path / "checkpoint-7", tmp_path / "checkpoint-12"]
    steps = [json.loads((folder / "grades_history.json").read_text())["last_step"] for folder in histories]
    assert steps == [12, 7, 12]


def test_a_vlm_callback_warns_of_a_tower_that_is_empty(hf, tmp_path, caplog):
    silent = {"save_stats": False, "alpha": 0}
    vlm = grades.VLMGradEarlyStoppingCallback(VLMGradEarlyStoppingConfig(**silent))
    hf.run(tmp_path, watchers=[vlm], max_steps=1)
    said = [record.getMessage() for record in caplog.records if record.name == "grades"]
    assert [line for line in said if "in the vision tower, so vision_tau has no effect" in line]
    caplog.clear()
    hf.run(tmp_path, GradEarlyStoppingConfig(**silent), max_steps=1)
    assert not [record for record in caplog.records if "has no effect" in record.getMessage()]
