"""A tiny Llama in transformers' Trainer with the callback. Takes seconds to import."""

import gc
import itertools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
from grades.marks import MARK, SWITCHES
from tiny.grades import ALWAYS, NEVER

gc.freeze()  # each Trainer collects garbage, which otherwise looks through all of the libraries: 0.3 s a run

ROWS, LAYERS, MATRICES = 48, 2, 14
OLDEST = transformers.__version__.startswith("5.0.")


class EightBit(torch.nn.Linear):
    """A linear of integer weights with one scale, as quantizing libraries hold them."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        whole = (linear.weight.detach() / self.scale).round().add(128).byte()
        self.weight = torch.nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight.float() - 128) * self.scale)


def quantize(linear: torch.nn.Linear, kind: bool | str) -> torch.nn.Module:
    if kind is True:
        return EightBit(linear)
    from bitsandbytes import nn

    sizes = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": False}
    if kind == "nf4":
        made = nn.Linear4bit(**sizes, compute_dtype=torch.float32, quant_type="nf4")
    else:
        made = nn.Linear8bitLt(**sizes, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")  # which quantizes


def llama(lora: dict | None = None, quantized: bool | str = False) -> torch.nn.Module:
    """Two layers, 14 matrices; lora: arguments of LoraConfig; quantized: the layers' weights are integers, of our own
    kind or, as "nf4" and "int8", of bitsandbytes.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if quantized:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                model.model.layers.set_submodule(name, quantize(module, quantized))
    return model if lora is None else get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora))


def rows() -> list[dict]:
    ids = torch.randint(64, (ROWS, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **others) -> dict:
    """Of TrainingArguments and its subclasses."""
    return {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "seed": 0, "weight_decay": 0.1,
    } | others  # fmt: skip


def settings(**others) -> GradEarlyStoppingConfig:
    """The attention freezes at step 5, the MLP never."""
    given = {"alpha": 0.3, "save_stats": False, "language_attention_tau": ALWAYS, "language_mlp_tau": NEVER}
    return GradEarlyStoppingConfig(**given | others)


def never(**others) -> GradEarlyStoppingConfig:
    """Nothing freezes."""
    return settings(language_attention_tau=NEVER, **others)


def run(
    folder, config=None, model=None, watchers=(), trainer=Trainer, resume=None, held_out=None, optimizer=None, **others
):
    """A finished run: its trainer, and its callback where it has a configuration. optimizer: makes it of the model."""
    callback = GradEarlyStoppingCallback(config) if config is not None else None
    model = model or llama()
    made = trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **others)),
        train_dataset=rows(),
        eval_dataset=held_out,
        optimizers=(optimizer(model) if optimizer else None, None),
        callbacks=[*([callback] if callback else []), *watchers],
    )
    made.train(resume_from_checkpoint=resume)
    return made, callback


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, sharded ones whole."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in parameters}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = weights(b)
    return all(torch.equal(weight, theirs[name]) for name, weight in weights(a).items())


def matrices(model: torch.nn.Module, component: str) -> list[str]:
    """The names of the parameters that are measured for a component."""
    names = [name for name, _ in model.named_parameters()]
    stem = component.removeprefix("model.") if component not in dict(model.named_modules()) else component
    return [name for name in names if stem in name and ("lora" in name) == hasattr(model, "peft_config")]


def left_on(trainer: Trainer) -> dict:
    """Where a callback could leave something: flags, hooks, and methods of the trainer and its parts."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "trains": {name: p.requires_grad for name, p in trainer.model.named_parameters()},
        "hooks": [len(getattr(m, kind)) for m in trainer.model.modules() for kind in hooks],
        "methods": [
            {name for name in vars(one) if callable(getattr(type(one), name, None))}
            for one in (trainer, trainer.accelerator, trainer.callback_handler)
        ],
    }


def ours(model: torch.nn.Module) -> list:
    """What GradES has put on the modules of a model: marks, methods and hooks."""
    held = [{MARK, *SWITCHES} & set(vars(module)) for module in model.modules()]
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return [*filter(None, held), *(hook for hook in hooks if hook.__module__.startswith("grades"))]


def train_and_check(trainer: Trainer, callback, **given) -> None:
    """Train with the callback of `settings` and check that it freezes the attention for good, lets the rest train,
    records it and leaves nothing behind. given: arguments of `train`.
    """
    before, watcher = {}, Weights()

    class Before(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):  # after what Trainer itself does to the model
            before.update(left_on(trainer))

    trainer.callback_handler.callbacks.insert(0, Before())
    trainer.add_callback(watcher)
    trainer.train(**given)
    model, monitor = trainer.model, callback.monitor
    frozen = monitor.frozen
    assert {name.split(".")[-2] for name in frozen} == {"self_attn"}
    assert 0 < len(frozen) == 4 * LAYERS < len(monitor.components) == MATRICES
    assert not watcher.moved(model, frozen)
    trained = {name for name, trains in before["trains"].items() if trains}
    stopped = {name: step for component, step in frozen.items() for name in matrices(model, component)}
    for step, following in itertools.pairwise(sorted(watcher.at)):
        for name, weight in watcher.at[step].items():
            still = torch.equal(weight, watcher.at[following][name])
            if name not in trained:
                assert still, (name, step)
            elif name in watcher.trains[step] and stopped.get(name, following) > step:
                assert not still, (name, step)
    history = monitor.history()
    assert {event["name"]: event["step"] for event in history["events"]} == frozen
    assert min(frozen.values()) == history["grace_steps"] + 1 < history["last_step"] == trainer.state.global_step
    after = left_on(trainer)
    assert (after["trains"], after["methods"]) == (before["trains"], before["methods"])
    assert not ours(model)


class SlowTrainer(Trainer):
    """Keeps the gradient of every parameter after each backward pass: at a step's last one, whole and not clipped."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        seen = self.__dict__.setdefault("seen", {})
        seen[self.state.global_step + 1] = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        return loss


class ClipsItself(Trainer):
    """Clips without accelerate."""

    def training_step(self, model, *args, **kwargs):
        self.accelerator.clip_grad_norm_ = lambda parameters, norm: torch.nn.utils.clip_grad_norm_(
            list(parameters), norm
        )
        return super().training_step(model, *args, **kwargs)


class Weights(TrainerCallback):
    """Keeps all parameters after each step, and which of them train."""

    def __init__(self):
        self.at: dict[int, dict[str, torch.Tensor]] = {}
        self.trains: dict[int, set[str]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)
        self.trains[state.global_step] = {name for name, p in model.named_parameters() if p.requires_grad}

    def moved(self, model: torch.nn.Module, frozen: dict[str, int]) -> list[tuple[str, int]]:
        """Frozen matrices that moved, and the steps after which they did. frozen: steps by component."""
        return [
            (name, step)
            for component, frozen_at in frozen.items()
            for step in range(frozen_at, max(self.at))
            for name in matrices(model, component)
            if not torch.equal(self.at[step][name], self.at[step + 1][name])
        ]


def check_freezing(folder, make_model=llama, config=None, optimizer=None, settles=False, **others):
    """A run in which the attention freezes at step 5, with everything that must hold of such a run.

    Until then it is the run without the callback; after that what is frozen never moves, and all else that trains does.
    The model is handed back as the run without the callback leaves it. Returns the trainer and the callback.

    settles: what freezes takes an averaged value.
    """
    watcher, plain = Weights(), Weights()
    short = others | {"max_steps": 5}
    without, _ = run(folder / "plain", None, make_model(), [plain], optimizer=optimizer, **short)
    model = make_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer, callback = run(folder, config or settings(), model, [watcher], optimizer=optimizer, **others)
    frozen = callback.monitor.frozen
    assert 0 < len(frozen) < len(callback.monitor.components) == MATRICES
    assert set(frozen.values()) == {5}
    for step in range(1, 5):
        assert all(torch.equal(weight, plain.at[step][name]) for name, weight in watcher.at[step].items()), step
    for name in watcher.trains[5] if settles else trained:
        assert torch.equal(watcher.at[5][name], plain.at[5][name]), name
    assert not watcher.moved(model, frozen)
    stopped = {name: step for component, step in frozen.items() for name in matrices(model, component)}
    for step, following in itertools.pairwise(sorted(watcher.at)):
        for name in watcher.at[step]:
            still = torch.equal(watcher.at[step][name], watcher.at[following][name])
            if name not in trained or (name not in watcher.trains[step] and stopped.get(name, 0) <= step):
                assert still, (name, step)
            elif stopped.get(name, following) > step:
                assert not still, (name, step)
    assert traces(model) == traces(without.model)
    return trainer, callback


def traces(model: torch.nn.Module) -> list:
    """What a run must not leave behind: flags, hooks, and what hangs at modules and parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = [[set(vars(m)), *(len(getattr(m, kind)) for kind in hooks)] for m in model.modules()]
    return [*found, *((p.requires_grad, set(vars(p))) for p in model.parameters())]
