"""The prefix over many architectures: what it stops, and that everything else trains as if nothing had frozen."""

import copy
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from tiny.grades import batch, make_model
from torch.utils.checkpoint import checkpoint

from grades import feeds, find_components
from grades.components import block_of
from grades.freezing import Freezer

# In tiny.architectures, which takes seconds to import.
NAMES = [
    "Llama", "Llama, tied", "Qwen3", "Phi", "Olmo2", "Gemma2", "Gemma3", "GPT-NeoX", "Falcon", "GPT-2", "OPT",
    "Mixtral", "Qwen3-MoE", "Gemma3n", "Gemma4", "Zamba2", "Falcon-H1", "Bamba", "T5", "Bart", "Whisper", "ViT", "CLIP",
    "SigLIP", "SmolVLM", "LLaVA", "PaliGemma", "Qwen2-VL", "Idefics", "BLIP", "Mllama", "Albert", "ModernBERT",
    "DeBERTa-v2",
]  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """The module tiny.architectures, which imports transformers."""
    pytest.importorskip("transformers")
    from tiny import architectures

    return architectures


def first_half(components) -> list[str]:
    """The names of the components in the first half of the blocks of each list of blocks."""
    lists: dict[str, set[int]] = {}
    for component in components:
        lists.setdefault(block_of(component.name)[0].rpartition(".")[0], set()).add(component.layer)
    ends = {name: min(layers) + math.ceil(len(layers) / 2) for name, layers in lists.items()}
    return [c.name for c in components if c.layer < ends[block_of(c.name)[0].rpartition(".")[0]]]


def backward(model: nn.Module, loss) -> None:
    model.zero_grad(set_to_none=True)
    loss(model).backward()


def first_tensor(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def detach_first(module, inputs, output):
    first = first_tensor(output).detach()
    return first if isinstance(output, torch.Tensor) else (first, *output[1:])


def freeze_first_half(model: nn.Module, loss) -> tuple[Freezer, set[str]]:
    """After one forward pass; returns the names of the parameters that the prefix has stopped too."""
    components = find_components(model)
    freezer = Freezer(model, components, None)
    loss(model)
    freezer.freeze(first_half(components))
    names = {p: name for name, p in model.named_parameters()}
    return freezer, {names[p] for p in freezer.prefix_parameters}


def check_gradients(model: nn.Module, twin: nn.Module, loss, freezer: Freezer, prefix: set[str]) -> None:
    """What is still to train has the gradient of the twin, in which all trains, bit for bit; and nothing else stops.

    A tied embedding whose lookup is cut off has the gradient of its other uses.
    """
    theirs = dict(twin.named_parameters())
    for path, module in model.named_modules():
        if module in freezer.cuts:
            twin.get_submodule(path).weight = nn.Parameter(module.weight.detach().clone())
    backward(model, loss)
    backward(twin, loss)
    frozen = {p for name in freezer.decided for p in freezer.by_name[name].parameters}
    for name, parameter in model.named_parameters():
        other = theirs[name]
        assert parameter.requires_grad == (other.requires_grad and parameter not in frozen and name not in prefix), name
        if parameter.requires_grad and other.grad is not None:
            assert torch.equal(parameter.grad, other.grad), name
        else:
            assert parameter.grad is None, name


def check_prefix(model: nn.Module, twin: nn.Module, loss, passed: set[str], prefix: set[str]) -> None:
    """Backward ends behind the passed blocks; what the prefix stopped has no effect but through their outputs."""
    reached = []
    for block in passed:
        twin.get_submodule(block).register_forward_hook(detach_first)
        model.get_submodule(block).register_forward_hook(
            lambda module, inputs, output: reached.append(first_tensor(output).requires_grad)
        )
    loss(model)
    assert not any(reached)
    assert len(reached) >= len(passed)
    backward(twin, loss)
    theirs = dict(twin.named_parameters())
    assert not [name for name in prefix if theirs[name].grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_half_frozen_the_rest_trains_as_if_nothing_were(models, name):
    architecture = models.ARCHITECTURES[name]
    model, given = models.build(architecture), models.batch(architecture)
    twin = copy.deepcopy(model)

    def loss(model):
        return models.loss(model, given)

    freezer, prefix = freeze_first_half(model, loss)
    check_gradients(model, twin, loss, freezer, prefix)
    blocks = {block for name in prefix if (block := block_of(name)[0]) in freezer.feeds.blocks}
    assert blocks == set(architecture.passed)
    outside = {name for name in prefix if block_of(name)[0] not in blocks}
    assert all(name.startswith(architecture.before) for name in outside)
    assert all(any(name.startswith(start) for name in outside) for start in architecture.before)
    assert {path for path, module in model.named_modules() if module in freezer.cuts} == set(architecture.cuts)
    check_prefix(model, twin, loss, blocks, prefix)


def test_the_list_of_architectures_is_whole(models):
    assert list(models.ARCHITECTURES) == NAMES


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.proj(self.norm(x))


class Plain(nn.Module):
    """An embedding, blocks, a norm and a head; `run` calls the blocks one after the other."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def run(self, x):
        for block in self.layers:
            x = block(x)
        return x

    def forward(self, ids):
        return self.head(self.norm(self.run(self.embed(ids))))


class Around(Plain):
    """As in a mixture of depths: half of the tokens go past each block."""

    def run(self, x):
        for block in self.layers:
            x = torch.cat((block(x[:, :4]), x[:, 4:]), dim=1)
        return x


class FeedsLast(Plain):
    """The last block sees the embeddings too."""

    def run(self, x):
        first = x
        for block in self.layers[:-1]:
            x = block(x)
        return self.layers[-1](x + first)


class Twice(Plain):
    """The first block is the last one too."""

    def run(self, x):
        return self.layers[0](super().run(x))


class AllStates(Plain):
    """Returns what each block returned."""

    def run(self, x):
        self.states = [x]
        for block in self.layers:
            self.states.append(block(self.states[-1]))
        return self.states[-1]

    def forward(self, ids):
        return {"logits": super().forward(ids), "hidden_states": self.states}


class Checkpointed(Plain):
    """reentrant: whether by checkpoint's use_reentrant=True, which hides the graph."""

    reentrant = True

    def run(self, x):
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


IDS = torch.arange(16).view(2, 8) % 10


def loss_of(model: nn.Module) -> torch.Tensor:
    output = model(IDS)
    return (output["logits"] if isinstance(output, dict) else output).square().mean()


def plain(kind: type[Plain] = Plain, **given) -> Plain:
    torch.manual_seed(0)
    return kind(**given)


def has_hooks(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or vars(m).get("_compiled_call_impl") for m in model.modules())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Around, FeedsLast, Twice, AllStates, Checkpointed])
def test_matrices_alone_freeze_where_backward_cannot_end(kind, tied):
    model = plain(kind, tied=tied)
    twin = copy.deepcopy(model)
    freezer, prefix = freeze_first_half(model, loss_of)
    assert len(freezer.applied) == 2
    assert not prefix
    assert not freezer.cuts
    check_gradients(model, twin, loss_of, freezer, prefix)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_that_shows_the_graph_and_compiled_blocks_have_a_prefix(tied, compiled):
    model = plain(Checkpointed, tied=tied)
    model.reentrant = False
    twin = copy.deepcopy(model)
    if compiled:
        for block in model.layers:
            block.compile(backend="eager")
    freezer, prefix = freeze_first_half(model, loss_of)
    blocks = {f"layers.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert prefix == blocks | (set() if tied else {"embed.weight"})
    assert set(freezer.cuts) == ({model.embed} if tied else set())
    check_gradients(model, twin, loss_of, freezer, prefix)


def test_of_a_model_compiled_as_a_whole_matrices_alone_freeze():
    model = plain()
    whole = torch.compile(model, backend="eager")
    freezer, prefix = freeze_first_half(whole, loss_of)
    assert len(freezer.applied) == 2
    assert not prefix
    assert not has_hooks(model)


def test_before_the_first_forward_pass_in_training_matrices_alone_freeze():
    model = plain()
    freezer = Freezer(model, find_components(model), None)
    with torch.no_grad():
        loss_of(model)
    freezer.freeze(["layers.0.proj"])
    assert not freezer.prefix_parameters
    loss_of(model)
    freezer.freeze(["layers.1.proj"])
    assert len(freezer.prefix_parameters) == 5


def test_nothing_stays_on_the_model_once_it_was_read_nor_after_an_error():
    model = plain()
    freezer = Freezer(model, find_components(model), None)
    with pytest.raises(IndexError):
        model(IDS + 10)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
    assert not freezer.feeds.is_known
    loss_of(model)
    assert freezer.feeds.is_known
    assert not has_hooks(model)


def test_a_tower_that_the_first_batches_leave_out_is_seen_when_it_is_called(monkeypatch):
    model, given = make_model(), batch(0)
    with_text = {"input_ids": given["input_ids"].clamp(max=29), "targets": given["targets"]}
    freezer = Freezer(model, find_components(model), None)
    model(**with_text)
    assert "decoder.blocks.0" in freezer.feeds.sources
    assert not any(station.startswith("vision") for station in freezer.feeds.sources)
    model(**given)
    assert not has_hooks(model)
    freezer.freeze([c.name for c in freezer.components if c.tower == "vision"])
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    monkeypatch.setattr(feeds, "MOST_FORWARDS", 3)
    model = make_model()
    Freezer(model, find_components(model), None)
    for reads in (True, True, False):
        model(**with_text)
        assert has_hooks(model) == reads


def test_a_resumed_run_knows_at_once_and_takes_the_prefix_back_where_it_hides_what_trains():
    freezer, prefix = freeze_first_half(plain(), loss_of)
    state = json.loads(json.dumps(freezer.state_dict()))
    for kind in (Plain, Checkpointed):
        model = plain(kind)
        resumed = Freezer(model, find_components(model), None)
        resumed.load_state_dict(state)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == prefix | {
            f"layers.{i}.proj.{part}" for i in (0, 1) for part in ("weight", "bias")
        }
        loss_of(model)
        resumed.check_prefix()
        assert bool(resumed.prefix_parameters) == (kind is Plain)
        backward(model, loss_of)
        assert all(p.grad is not None for p in model.layers[2:].parameters())
        assert len(resumed.applied) == 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_sharded_weights_are_known_by_their_names(tied, compiled):
    """FSDP2, of one rank: the graph holds what was gathered."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, mesh = plain(tied=tied), init_device_mesh("cpu", (1,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
            if compiled:
                block.compile(backend="eager")
        fully_shard(model, mesh=mesh)
        freezer, prefix = freeze_first_half(model, lambda model: backward(model, loss_of))
        assert prefix == {f"layers.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias")} | (
            set() if tied else {"embed.weight"}
        )
        assert set(freezer.cuts) == ({model.embed} if tied else set())
        backward(model, loss_of)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_ranks_join_what_they_have_seen(monkeypatch):
    """Each has seen another tower; and one that hides what trains speaks for all."""
    model = plain()
    read = [feeds.Feeds(model, find_components(model)) for _ in range(2)]
    read[0].load_state_dict({"": ["head.weight", "a.0"], "a.0": ["x"]})
    read[1].load_state_dict({"": ["head.weight", "b.0"], "b.0": ["y"]})

    def gather(found, own):
        found[:] = [(of_rank.state_dict(), of_rank.is_hidden) for of_rank in read]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    read[0].share()
    assert read[0].state_dict() == {"": ["a.0", "b.0", "head.weight"], "a.0": ["x"], "b.0": ["y"]}
    assert read[0].is_known
    read[1].is_hidden = True
    read[0].share()
    assert not read[0].is_known
