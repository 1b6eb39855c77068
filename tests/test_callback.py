"""The callbacks in transformers.Trainer: what they measure, freeze, log, save and resume."""

import itertools
import json
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import grades
from grades import (
    GradEarlyStoppingCallback,
    GradEarlyStoppingConfig,
    GradESConfig,
    VLMGradEarlyStoppingCallback,
    VLMGradEarlyStoppingConfig,
)
from grades.callback import check_parallelism

NEVER = 1e-12  # a tau that nothing is below
ROWS = 48
OLDEST = transformers.__version__.startswith("5.0.")


def llama(lora=None):
    """Two layers, 14 matrices; lora: arguments of LoraConfig."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora)) if lora is not None else model


def rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (ROWS, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **others):
    given = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "seed": 0, "weight_decay": 0.1,
    }  # fmt: skip
    return TrainingArguments(**given | others)


def settings(**others):
    given = {"tau": 3.2, "alpha": 0.3, "save_stats": False}  # small matrices freeze first, the MLP's never
    return GradEarlyStoppingConfig(**given | others)


def run(folder, config=None, model=None, watchers=(), trainer=Trainer, resume=None, **others):
    """A finished run: its trainer, and its callback where it has a configuration."""
    callback = GradEarlyStoppingCallback(config) if config is not None else None
    made = trainer(
        model=model or llama(),
        args=arguments(folder, **others),
        train_dataset=rows(),
        callbacks=[*([callback] if callback else []), *watchers],
    )
    made.train(resume_from_checkpoint=resume)
    return made, callback


def copies(model):
    """All parameters, sharded ones whole."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in parameters}


def weights(trainer):
    return copies(trainer.model)


class SlowTrainer(Trainer):
    """Keeps the gradient of every parameter after each backward pass: at a step's last one, whole and not clipped."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        seen = self.__dict__.setdefault("seen", {})
        seen[self.state.global_step + 1] = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        return loss


class Weights(TrainerCallback):
    """Keeps all parameters after each step, and which of them train."""

    def __init__(self):
        self.at, self.trains = {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = copies(model)
        self.trains[state.global_step] = {name for name, p in model.named_parameters() if p.requires_grad}


def matrices(model, component):
    """The names of the parameters that are measured for a component."""
    names = [name for name, _ in model.named_parameters()]
    stem = component.removeprefix("model.") if component not in dict(model.named_modules()) else component
    return [name for name in names if stem in name and ("lora" in name) == hasattr(model, "peft_config")]


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
def test_each_metric_is_what_a_slow_computation_says(tmp_path, metric, max_grad_norm, lora):
    watcher = Weights()
    config = settings(metric=metric, tau=NEVER, compute_interval=2)
    trainer, callback = run(
        tmp_path, config, llama(lora), [watcher], SlowTrainer,
        max_steps=6, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    monitor = callback.monitor
    assert len(monitor.components) == 14
    assert [check["step"] for check in monitor.checks] == [2, 4, 6]
    series = {"weight_change": watcher.at}.get(metric, trainer.seen)
    before = {"weight_change": 2, "gradient_change": 1}.get(metric)
    for check in monitor.checks:
        if metric == "weight_change" and check["step"] == 2:
            assert set(check["values"]) == {None}
            continue
        for component, value in zip(monitor.components, check["values"], strict=True):
            names = matrices(trainer.model, component.name)
            assert len(names) == (1 if lora is None else 2)
            now = series[check["step"]]
            then = series[check["step"] - before] if before else dict.fromkeys(names, 0)
            slow = sum((now[name] - then[name]).abs().sum().item() for name in names)
            assert value == pytest.approx(slow, rel=1e-5), component.name


@pytest.mark.parametrize(
    ("lora", "config", "others"),
    [
        (None, {}, {}),
        ({}, {}, {}),
        ({"use_dora": True}, {}, {"gradient_accumulation_steps": 2}),
        (None, {}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        (None, {}, {"bf16": True}),
        (None, {"freeze_rounds": 2}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ],
    ids=["full", "lora", "dora", "checkpointing", "bf16", "compile"],
)
def test_what_is_frozen_never_moves_and_the_rest_does(tmp_path, lora, config, others):
    watcher = Weights()
    model = llama(lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = settings(tau=3.2 if lora is None else 0.88, **config)
    trainer, callback = run(tmp_path, config, model, [watcher], **others)
    frozen, names = callback.monitor.frozen, list(weights(trainer))
    assert 0 < len(frozen) < 14, "some freeze, some do not"
    steps = sorted(watcher.at)
    of = {name: next((c for c in frozen if name in matrices(model, c)), None) for name in names}
    for name in names:
        for step, following in itertools.pairwise(steps):
            still = torch.equal(watcher.at[step][name], watcher.at[following][name])
            stopped = of[name] is not None and frozen[of[name]] <= step
            if stopped or name not in trained:
                assert still, (name, step)
            elif name in watcher.trains[step]:
                assert not still, (name, step)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained, "handed back as it came"


class FourBit(torch.nn.Linear):
    """A linear of 4-bit weights, two in a byte and with one scale, as quantizing libraries hold them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 7
        whole = (linear.weight.detach() / self.scale).round().add(8).byte().view(-1, 2)
        self.weight = torch.nn.Parameter((whole[:, 0] * 16 + whole[:, 1])[:, None], requires_grad=False)

    def forward(self, x):
        whole = torch.cat([self.weight // 16, self.weight % 16], dim=1).view(self.out_features, self.in_features)
        return torch.nn.functional.linear(x, (whole.float() - 8) * self.scale)


def test_a_4_bit_base_stays_and_its_adapters_freeze(tmp_path):
    model = llama()
    for layer in model.model.layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]:
            layer.set_submodule(name, FourBit(linear))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    watcher = Weights()
    before = copies(model)
    _, callback = run(tmp_path, settings(tau=0.88), model, [watcher])
    assert sum(weight.dtype == torch.uint8 for weight in before.values()) == len(callback.monitor.components) == 14
    assert 0 < len(callback.monitor.frozen) < 14
    for name, weight in watcher.at[12].items():
        component = next((c for c in callback.monitor.frozen if c in name), None)
        if "lora_" not in name:
            assert torch.equal(weight, before[name]), name
            assert name not in watcher.trains[1]
        elif component is not None:
            assert torch.equal(weight, watcher.at[callback.monitor.frozen[component]][name]), name


@pytest.mark.parametrize(
    ("metric", "others"),
    [("weight_change", {}), ("gradient_change", {"gradient_accumulation_steps": 2, "bf16": True})],
    ids=["weight_change", "gradient_change, bf16"],
)
def test_a_run_that_freezes_nothing_is_bit_for_bit_the_run_without(tmp_path, metric, others):
    without, _ = run(tmp_path, **others)
    random_state = torch.get_rng_state()
    trainer, callback = run(tmp_path, settings(metric=metric, tau=NEVER), **others)
    assert len(callback.monitor.checks) == 12
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, weight in weights(without).items():
        assert torch.equal(weights(trainer)[name], weight), name
    ours, theirs = trainer.state.log_history[0], without.state.log_history[0]
    assert {key: ours[key] for key in theirs} == theirs


RESUMED = {
    "snapshot from between two saves": {"compute_interval": 2, "tau": 3.0},
    "gradient of the step before": {"metric": "gradient_change", "tau": 1.9},
    "sum of learning rates": {"tau_mode": "per_element_lr", "compute_interval": 2, "tau": 0.365},
    "peaks and streaks": {"tau_mode": "relative", "tau": 0.37, "patience": 2},
}


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, config):
    config = settings(**config)
    saving = {"save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "cosine", "logging_steps": 1}
    whole, first = run(tmp_path / "a", config, **saving)
    early = [name for name, step in first.monitor.frozen.items() if step <= 7]
    assert 0 < len(early) < 14, "the checkpoint holds frozen matrices, and some that train on"
    resumed, second = run(tmp_path / "b", config, resume=str(tmp_path / "a" / "checkpoint-7"), **saving)
    assert second.monitor.history() == first.monitor.history()
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name
    untimed = [{k: v for k, v in log.items() if "train" not in k} for log in whole.state.log_history[:-1]]
    assert [{k: v for k, v in log.items() if "train" not in k} for log in resumed.state.log_history[:-1]] == untimed


class FirstStep(TrainerCallback):
    """Which parameters train in the first step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not hasattr(self, "trains"):
            self.trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trainer_state_alone_brings_back_what_is_frozen(tmp_path, caplog):
    """As after save_only_model, or with another number of sharded ranks."""
    _, first = run(tmp_path, settings(), save_strategy="steps", save_steps=7)
    checkpoint = tmp_path / "checkpoint-7"
    frozen = {name: step for name, step in first.monitor.frozen.items() if step <= 7}
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["GradEarlyStoppingCallback"]["attributes"]["saved_state"]["frozen"] == frozen
    (checkpoint / "grades_state.pt").unlink()
    watcher = FirstStep()
    run(tmp_path, settings(), watchers=[watcher], resume=str(checkpoint), restore_callback_states_from_checkpoint=True)
    assert frozen
    assert not {f"{name}.weight" for name in frozen} & watcher.trains
    assert "measured anew" in caplog.text


def test_a_checkpoint_without_grades_freezes_nothing_before_it_was_measured(tmp_path, caplog):
    run(tmp_path, save_strategy="steps", save_steps=7)
    _, callback = run(tmp_path, settings(tau=1e9), resume=str(tmp_path / "checkpoint-7"))
    assert "holds no state" in caplog.text
    assert set(callback.monitor.checks[0]["values"]) == {None}
    assert set(callback.monitor.frozen.values()) == {9}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_run_ends_at_max_frozen_ratio_and_stays_ended(tmp_path, accumulation, caplog):
    config = settings(max_frozen_ratio=0.25)
    given = {"save_strategy": "steps", "save_steps": 100, "gradient_accumulation_steps": accumulation}
    trainer, callback = run(tmp_path, config, **given)
    end = trainer.state.global_step
    assert 4 < end < 12
    assert callback.monitor.history()["stopped_early"]
    assert trainer.state.log_history[-1]["grades/frozen_share"] >= 0.25
    frozen = len(callback.monitor.frozen)
    assert f"the run ends at step {end} of 12, as {frozen} of 14 matrices are frozen" in caplog.text
    again, _ = run(tmp_path, config, resume=str(tmp_path / f"checkpoint-{end}"), **given)
    assert again.state.global_step <= end + 1
    for name, weight in weights(trainer).items():
        assert torch.equal(weights(again)[name], weight), name


def test_logs_hold_the_frozen_share_and_the_mean(tmp_path):
    trainer, callback = run(tmp_path, settings())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    checks = {check["step"]: check["values"] for check in callback.monitor.checks}
    for log in logs:
        frozen = sum(step <= log["step"] for step in callback.monitor.frozen.values())
        assert log["grades/frozen_share"] == frozen / 14
        values = [value for value in checks[log["step"]] if value is not None]
        assert log["grades/weight_change_language_mean"] == pytest.approx(sum(values) / len(values))
    assert logs[-1]["grades/frozen_share"] > 0


def test_total_steps_by_epochs(tmp_path):
    _, callback = run(tmp_path, settings(alpha=0.5), max_steps=-1, num_train_epochs=2)
    assert callback.monitor.total_steps == 2 * ROWS // 4
    assert callback.monitor.grace_steps == 12


def test_the_learning_rate_is_the_one_of_the_step(tmp_path):
    """Trainer sets the next step's rate before the callback hears that the step is done."""

    class Rates(TrainerCallback):
        def __init__(self):
            self.rates = []

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append(optimizer.param_groups[0]["lr"])

    plain, rates = settings(tau=NEVER), Rates()
    _, absolute = run(tmp_path, plain, watchers=[rates], lr_scheduler_type="cosine")
    _, scaled = run(tmp_path, settings(tau=NEVER, tau_mode="per_element_lr"), lr_scheduler_type="cosine")
    elements = [component.elements for component in absolute.monitor.components]
    for raw, unit in zip(absolute.monitor.checks[1:], scaled.monitor.checks[1:], strict=True):
        rate = rates.rates[raw["step"] - 1]
        assert unit["values"] == pytest.approx([v / n / rate for v, n in zip(raw["values"], elements, strict=True)])


def test_two_runs_of_one_trainer(tmp_path):
    callback = GradEarlyStoppingCallback(settings())
    trainer = Trainer(model=llama(), args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    for _ in range(2):
        trainer.train()
        assert callback.monitor.last_step == 12
        assert callback.monitor.frozen
        assert "log" not in vars(trainer)
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class ClipsItself(Trainer):
    """Clips without accelerate."""

    def training_step(self, model, *args, **kwargs):
        self.accelerator.clip_grad_norm_ = lambda parameters, norm: torch.nn.utils.clip_grad_norm_(
            list(parameters), norm
        )
        return super().training_step(model, *args, **kwargs)


def test_gradients_that_cannot_be_seen_before_clipping_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        run(tmp_path, settings(metric="gradient_norm"), trainer=ClipsItself)
    _, callback = run(tmp_path, settings(), trainer=ClipsItself)
    assert callback.monitor.frozen


def test_trl_trains_adapters(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(62))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    texts = [" ".join(f"w{i % 62}" for i in row["input_ids"]) for row in rows()]
    given = {
        "output_dir": str(tmp_path), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_length": 16, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    callback, watcher = GradEarlyStoppingCallback(settings(tau=0.88)), Weights()
    SFTTrainer(
        model=llama(),
        args=SFTConfig(**given),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback, watcher],
    ).train()
    assert 0 < len(callback.monitor.frozen) < 14
    for name, step in callback.monitor.frozen.items():
        for adapter in ("lora_A", "lora_B"):
            weight = next(key for key in watcher.at[8] if f"{name}.{adapter}" in key)
            assert torch.equal(watcher.at[step][weight], watcher.at[8][weight]), weight


def test_a_vlm_has_a_tau_for_each_tower(tmp_path):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(0)
    blocks = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Idefics3Config(
        vision_config=blocks | {"num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        text_config=blocks
        | {"model_type": "llama", "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        scale_factor=2, image_token_id=63, pad_token_id=0,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    images = torch.rand(ROWS, 1, 3, 16, 16)
    data = [{"input_ids": [63] * 4 + row["input_ids"][:8], "pixel_values": images[i]} for i, row in enumerate(rows())]
    for row in data:
        row["input_ids"] = [*row["input_ids"][:4], *(i % 60 for i in row["input_ids"][4:])]
        row["labels"] = [-100] * 4 + row["input_ids"][4:]
    config = VLMGradEarlyStoppingConfig(vision_tau=1e9, language_tau=NEVER, alpha=0.5, save_stats=False)
    callback, watcher = VLMGradEarlyStoppingCallback(config), Weights()
    given = arguments(tmp_path, max_steps=8)
    Trainer(model=model, args=given, train_dataset=data, callbacks=[callback, watcher]).train()
    towers = {component.name: component.tower for component in callback.monitor.components}
    assert set(callback.monitor.frozen) == {name for name, tower in towers.items() if tower == "vision"}
    assert len(callback.monitor.frozen) == 12
    assert set(callback.monitor.frozen.values()) == {5}
    for name, weight in watcher.at[8].items():  # norms and embeddings of the tower stop with its last matrix
        assert torch.equal(weight, watcher.at[5][name]) == ("vision_model" in name), name


DISTRIBUTED = {
    # A reducer that waits for every gradient that there was at its making.
    "strict": ({}, None, {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}),
    "lora": ({"metric": "gradient_norm", "tau": 0.4}, {}, {"gradient_checkpointing": True}),
    "sharded": (
        {"compute_interval": 2, "tau": 5.0},
        None,
        {
            "fsdp": "full_shard" if OLDEST else True,
            "fsdp_config": {
                "version": 2, "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT",
                "cpu_ram_efficient_loading": False,
            },
        },
    ),
}  # fmt: skip


def claim_gpus():
    """In this process: accelerate shards on GPUs alone, though torch does so on a CPU as well."""
    init = PartialState.__init__

    def claim(self, *args, **kwargs):
        init(self, *args, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = claim


def one_rank(rank, port, folder, case):
    """In a process of its own: a run, one that resumes it, and what came out of both."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for singleton in (AcceleratorState, PartialState, GradientState):
        singleton._shared_state.clear()
    config, lora, others = DISTRIBUTED[case]
    if "fsdp" in others:
        claim_gpus()
    others = others | {
        "per_device_train_batch_size": 2,
        "ddp_backend": "gloo",
        "save_strategy": "steps",
        "save_steps": 7,
    }
    watcher = Weights()
    trainer, callback = run(folder, settings(**config), llama(lora), [watcher], **others)
    moved = [
        (name, step)
        for name, frozen_at in callback.monitor.frozen.items()
        for step in range(frozen_at, max(watcher.at))
        for weight in matrices(trainer.model, name)
        if not torch.equal(watcher.at[step][weight], watcher.at[step + 1][weight])
    ]
    if not OLDEST:  # which cannot load an optimizer on several CPU ranks
        others["resume"] = str(folder / "checkpoint-7")
    resumed, again = run(folder, settings(**config), llama(lora), **others)
    found = {
        "world": trainer.args.world_size, "rounds": callback.monitor.freezer.rounds_done, "moved": moved,
        "checks": callback.monitor.checks, "frozen": callback.monitor.frozen, "frozen_again": again.monitor.frozen,
    }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.save([weights(trainer), weights(resumed)], folder / f"{rank}.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts ranks by fork")
@pytest.mark.parametrize("case", DISTRIBUTED)
def test_two_ranks_freeze_as_one_does(tmp_path, case):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, port, tmp_path, case)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=300)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
    assert not first["moved"]
    assert 0 < len(first["frozen"]) < 14
    assert 0 < first["rounds"] <= 8
    assert first["frozen_again"] == first["frozen"]
    (ours, resumed), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, weight in ours.items():
        assert torch.equal(others[name], weight), name
        assert torch.equal(resumed[name], weight), name
    config, lora, given = DISTRIBUTED[case]
    given = {name: value for name, value in given.items() if "fsdp" not in name}
    _, alone = run(tmp_path / "alone", settings(**config), llama(lora), **given)
    for here, there in zip(alone.monitor.checks[1:4], first["checks"][1:4], strict=True):
        pairs = [pair for pair in zip(here["values"], there["values"], strict=True) if None not in pair]
        assert len(pairs) > 7
        assert [there for _, there in pairs] == pytest.approx([here for here, _ in pairs], rel=1e-3)


def test_options_of_the_authors_package_are_taken_with_its_defaults():
    llm, vlm = GradEarlyStoppingConfig(), VLMGradEarlyStoppingConfig()
    assert (llm.tau, llm.vision_tau, llm.language_tau) == (1e-4, 1e-4, 1e-4)
    assert (vlm.vision_tau, vlm.language_tau, vlm.freeze_vision, vlm.freeze_language) == (1e-5, 1e-4, True, True)
    for config in (llm, vlm):
        assert (config.metric, config.tau_mode, config.patience) == ("weight_change", "absolute", 1)
        assert (config.alpha, config.max_frozen_ratio, config.compute_interval) == (0.3, 1.0, 1)
        assert (config.history_maxlen, config.log_interval, config.output_dir) == (1000, 10, "./grades_output")
        assert config.save_stats
    config = GradEarlyStoppingConfig(
        tau=0.02, alpha=0.5, max_frozen_ratio=0.9, compute_interval=5, target_components=None,
        auto_detect_mode=False, use_cuda_acceleration=False, enable_wandb_logging=True, log_interval=5,
        history_maxlen=10, save_stats=True, save_freezing_history=True, output_dir=None,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="without effect") as warned:
        GradEarlyStoppingCallback(config)
    assert len(warned) == 1
    ignored = ("auto_detect_mode", "use_cuda_acceleration", "enable_wandb_logging", "log_interval")
    assert all(name in str(warned[0].message) for name in ignored)


def test_impossible_settings_are_named_before_training():
    with pytest.raises(ValueError, match=r"^--alpha 1: .*\n--tau -1: .*$"):
        GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=-1, alpha=1))
    with pytest.raises(ValueError, match="vision_tau 0"):
        VLMGradEarlyStoppingCallback(GradESConfig(vision_tau=0))
    with pytest.raises(TypeError, match="language_tau"):
        GradEarlyStoppingConfig(language_tau=1.0)


def test_what_cannot_freeze_is_an_error_at_the_start_of_training():
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        with pytest.raises(ValueError, match=kind.value):
            check_parallelism(SimpleNamespace(distributed_type=kind, is_fsdp2=False), None)
    check_parallelism(SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True), None)
    with pytest.raises(ValueError, match="ddp_static_graph"):
        check_parallelism(
            SimpleNamespace(distributed_type=DistributedType.MULTI_GPU), SimpleNamespace(static_graph=True)
        )
    with pytest.raises(ValueError, match="Trainer only"):
        GradEarlyStoppingCallback().on_train_begin(None, None, None)


def test_presets_are_the_papers_tables():
    table_9 = {
        "qwen3-14b": (6.387926, 0.025181), "phi4-14b": (3.512882, 0.025181), "qwen3-0.6b": (1.804456, 0.001183),
        "llama-3.1-8b": (2.404167, 0.021637), "mistral-7b": (2.726866, 0.029591),
    }  # fmt: skip
    table_10 = {
        "qwen2.5-vl-7b/lora": (3.3, 33.0, 0.30), "qwen2.5-vl-7b/full-4bit": (0.13, 0.09, 0.30),
        "nanovlm": (0.30, 6.00, 0.28), "nanovlm-alt": (6.30, 3.90, 0.28),
    }  # fmt: skip
    assert len(grades.presets) == 2 * len(table_9) + len(table_10) == len(set(grades.presets))
    for model, taus in table_9.items():
        for method, tau in zip(("full", "lora"), taus, strict=True):
            config = GradEarlyStoppingCallback(grades.presets[f"{model}/{method}"]).config
            assert (config.tau, config.vision_tau, config.language_tau, config.alpha) == (tau, tau, tau, 0.55)
            assert (config.metric, config.compute_interval) == ("weight_change", 1)
    for name, expected in table_10.items():
        config = VLMGradEarlyStoppingCallback(grades.presets[name]).config
        assert (config.vision_tau, config.language_tau, config.alpha) == expected
        assert (config.metric, config.compute_interval) == ("weight_change", 20 if "nanovlm" in name else 1)
    with pytest.raises(KeyError, match=r"qwen3-0\.6b/lora"):
        grades.presets["qwen3-0.6b"]


def test_report_needs_the_history_alone(tmp_path, capsys):
    from grades.__main__ import main

    config = settings(save_stats=True, output_dir=str(tmp_path / "out"), history_maxlen=5)
    _, callback = run(tmp_path, config, save_strategy="steps", save_steps=7)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "grades_history.json", "convergence.png", "freezing.png",
    }  # fmt: skip
    assert [check["step"] for check in callback.monitor.checks] == [4, 8, 12]
    (tmp_path / "out" / "freezing.png").unlink()
    capsys.readouterr()
    main(["report", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for component in callback.monitor.components:
        step = callback.monitor.frozen.get(component.name)
        assert any(component.name in line and line.endswith(f" {step or '-'}") for line in lines), component.name
    assert f"language: {len(callback.monitor.frozen)} of 14 frozen" in printed
    assert (tmp_path / "out" / "freezing.png").stat().st_size > 1000
    assert Path(lines[-1]) == tmp_path / "out" / "freezing.png"

    main(["report", str(tmp_path), "--output", str(tmp_path / "pictures")])  # of the latest checkpoint
    assert "12 of 12 steps" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "convergence.png").is_file()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "pictures")])
    assert "grades_history.json" in capsys.readouterr().err
