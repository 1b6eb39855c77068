"""What a run will take, found before anything is downloaded: parameters, tokens, FLOPs, memory.

The model here has no memory (PyTorch's fake tensors). A batch goes forward and backward in the very code of the
training step, and every tensor that would be made is counted.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grades import GradESConfig, find_components
from grades.components import Component
from grades.reading import make_reader
from training import setup
from training.arguments import Settings
from training.flops import model_cost
from training.step import forward_backward

LABEL_SHARE = 0.25  # of a row's tokens carry a label: questions, image tokens and templates do not
# Copies that a metric keeps of the matrices, or of the reader's sample of them.
SNAPSHOTS = {"weight_change": 1, "gradient_change": 1, "gradient_norm": 0, "gradient_rms": 0}
# malloc on a CPU keeps holes between tensors that come and go: so much more than they take. Measured, with glibc.
HEAP_SHARE = {"cpu": 0.4}


class AllocationMeter(TorchDispatchMode):
    """Within this context: the bytes of the tensors made in it that live, now and at most."""

    def __init__(self, present: Iterable[torch.Tensor]):
        """present: tensors that are there already and do not count."""
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in present)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass
class Part:
    """A tower, or the projector between them."""

    name: str
    parameters: int
    trainable: int
    components: int  # what GradES watches


@dataclass
class Plan:
    """Of steps whose rows have max_sample_length tokens and one image, as large as can be, and with nothing frozen.

    With packing rows have lm_max_length tokens and as many images as fit. Sizes in memory are those of one process.
    """

    device: str
    processes: int
    parts: list[Part]
    micro_batches: int  # in a step of one process
    rows: int  # in a micro-batch
    row_tokens: int
    images: int  # in a micro-batch, tiles counted
    steps: int
    step_flops: int  # of all processes
    # Bytes. The peak is less than their sum where gradients grow only as activations go.
    weights: int
    gradients: int
    optimizer: int
    grades: int  # what GradES compares the next check with
    activations: int  # with the batch, and what a micro-batch makes besides until it needs the most
    peak: int

    @property
    def step_tokens(self) -> int:
        return self.processes * self.micro_batches * self.rows * self.row_tokens


def make_plan(model: nn.Module, settings: Settings, device: torch.device, processes: int = 1) -> Plan:
    """The plan of a run on the device, or one device for each of its processes.

    model: a VisionLanguageModel on the meta device with its adapters; used up.
    """
    with FakeTensorMode():
        _pretend(model, device)
        return _make_plan(model, settings, device, processes)


def _make_plan(model: nn.Module, settings: Settings, device: torch.device, processes: int) -> Plan:
    cfg = settings.train
    shards = processes if cfg.parallel == "fsdp" else 1
    setup.make_optimizer(model, cfg)  # freezes what has no learning rate
    setup.spare_memory(model, cfg)
    components = find_components(model, settings.grades.target_components) if cfg.enable_grades else []
    present = [*model.parameters(), *model.buffers()]
    weights, gradients = _bytes(present), _bytes(p for p in model.parameters() if p.requires_grad)
    snapshots = _snapshot_bytes(components, settings.grades)
    if shards > 1:  # a gradient is whole until it has been divided among the processes
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget_gradient)

    with AllocationMeter(present) as meter:
        batch = full_batch(settings, device)
        autocast = setup.autocast(device, cfg.dtype)
        forward_backward(model, [batch], device, autocast)
    activations = round(meter.peak * (1 + HEAP_SHARE.get(device.type, 0)))
    # Of the micro-batches before, which are not divided before the last one.
    before = gradients if cfg.gradient_accumulation_steps > 1 else 0
    held = [-(-size // shards) for size in (weights, gradients, 2 * gradients, snapshots)]
    if shards > 1:
        before = max(before, held[1])
    return Plan(
        device=device.type,
        processes=processes,
        parts=[
            _part("vision", model.vision_encoder, components),
            _part("projector", model.MP, components),
            _part("language", model.decoder, components),
        ],
        micro_batches=cfg.gradient_accumulation_steps,
        rows=batch["input_ids"].shape[0],
        row_tokens=batch["input_ids"].shape[1],
        images=batch["images"].shape[0],
        steps=cfg.max_training_steps,
        step_flops=processes * cfg.gradient_accumulation_steps * model_cost(model).of(batch),
        weights=held[0],
        gradients=held[1],
        optimizer=held[2],  # AdamW's two moments
        grades=held[3],
        activations=activations,
        peak=held[0] + held[2] + held[3] + before + activations,
    )


def full_batch(settings: Settings, device: torch.device) -> dict:
    """A micro-batch in the shape of the collator's. With turns_per_image so many rows share an image; a packed row
    holds as many images as max_images_per_knapsack and its tokens allow."""
    vlm, cfg = settings.vlm, settings.train
    side = vlm.max_img_size // vlm.vit_img_size
    tiles = side**2 + ("global_image_token" in vlm.vlm_extra_tokens) if side > 1 else 1
    turns, length = cfg.turns_per_image or 1, cfg.max_sample_length
    if cfg.packing:
        turns, length = 1, vlm.lm_max_length
        tiles *= max(cfg.max_images_per_knapsack, cfg.max_images_per_example)  # which has a row of its own
    tiles = max(1, min(tiles, (length - 1) // vlm.mp_image_token_length))
    rows = cfg.batch_size * turns
    slots, labels = rows * tiles * vlm.mp_image_token_length, rows * max(1, round(LABEL_SHARE * length))

    def indices(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    documents = {}
    if cfg.packing and device.type != "cuda":  # there FlexAttention attends by blocks, which take next to nothing
        documents = {"position_ids": indices(rows, length), "document_ids": indices(rows, length).int()}
    return documents | {
        "input_ids": indices(rows, length),
        "targets": indices(rows, length),
        "images": torch.zeros(cfg.batch_size * tiles, 3, vlm.vit_img_size, vlm.vit_img_size, device=device),
        "image_slots": indices(slots),
        "image_sources": indices(slots) if cfg.turns_per_image else None,
        "label_positions": indices(labels),
        "num_labels": labels,
    }


def plan_lines(plan: Plan) -> list[str]:
    """The plan in words."""
    everything = Part(
        "all", *(sum(getattr(p, n) for p in plan.parts) for n in ("parameters", "trainable", "components"))
    )
    lines = [f"{'':<12}{'parameters':>15}{'trainable':>15}{'watched by GradES':>20}"]
    lines += [
        f"{p.name:<12}{p.parameters:>15,}{p.trainable:>15,}{p.components:>11,} matrices"
        for p in [*plan.parts, everything]
    ]
    rows = f"{plan.rows:,} rows of at most {plan.row_tokens:,} tokens with {plan.images:,} images (or tiles)"
    each = f" of each of {plan.processes:,} processes" if plan.processes > 1 else ""
    parts = {
        "weights": plan.weights,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "GradES": plan.grades,
        "activations": plan.activations,
    }
    besides = ", with FSDP the weights of the layers at work," if plan.processes > 1 else ""
    return [
        *lines,
        f"micro-batch {rows}; {plan.micro_batches:,} in a step{each}",
        f"tokens      at most {plan.step_tokens:,} a step, {plan.step_tokens * plan.steps:,} in {plan.steps:,} steps",
        f"FLOPs       {_scaled(plan.step_flops)} a step, {_scaled(plan.step_flops * plan.steps)} the run "
        "(matrix products, nothing frozen)",
        "memory      " + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items()) + " GiB",
        f"peak        {_gib(plan.peak)} GiB in a step on {plan.device}; on top come Python with its libraries (0.8 GiB "
        f"on a CPU){besides} and evaluation",
    ]


def _pretend(model: nn.Module, device: torch.device) -> None:
    """Put fake tensors on the device in place of the model's; what was tied stays so."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if old not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[old])


def _part(name: str, module: nn.Module, components: list[Component]) -> Part:
    sizes = {parameter: parameter.numel() for parameter in module.parameters()}
    trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    return Part(name, sum(sizes.values()), trainable, sum(component.tower == name for component in components))


def _snapshot_bytes(components: list[Component], config: GradESConfig) -> int:
    reader = make_reader(config.monitor_sample)
    return SNAPSHOTS[config.metric] * sum(_bytes(reader.copy(component.weights)) for component in components)


def _forget_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**30 else f"{size / 2**30:.3f}"


def _scaled(flops: int) -> str:
    """In the largest unit that it reaches."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return f"{flops / size:,.2f} {unit}"
    return f"{flops / 1e9:,.2f} GFLOP"
