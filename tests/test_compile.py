"""Freezing under torch.compile: few compilations, never past dynamo's limit, and a backward pass that shrinks."""

import contextlib
import random
import shutil

import pytest
import torch
import torch.nn as nn
from tiny.grades import ALWAYS, FAMILIES, NEVER, batch, make_model

from grades import GradESConfig, GradESMonitor, compiled, find_components
from grades.compiled import DEFAULT_RECOMPILE_LIMIT, PATTERNS, flippable
from grades.freezing import Freezer
from models.modality_projector import grid_windows

PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


@pytest.fixture(autouse=True, params=["notices", "drops"])
def drops(request, monkeypatch):
    """Dynamo as in a new process, but a full cache is an error instead of a warning. Whether a round drops all."""
    from torch._dynamo import config  # takes seconds to import

    before = config.recompile_limit
    if request.param == "drops":
        monkeypatch.setattr(compiled, "notices_freezing", lambda: False)
    elif not compiled.notices_freezing():
        pytest.skip("this torch does not notice that requires_grad has changed")
    torch.compiler.reset()
    config.recompile_limit = DEFAULT_RECOMPILE_LIMIT
    with config.patch(fail_on_recompile_limit_hit=True):
        yield request.param == "drops"
    torch.compiler.reset()
    config.recompile_limit = before


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.q_proj(self.norm(x)) * self.k_proj(x)
        return x + self.down_proj(self.up_proj(x).relu())


class Blocks(nn.Module):
    """The least that has components: blocks of four matrices."""

    def __init__(self, blocks: int, compile_with=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(blocks))
        if compile_with is not None:
            for block in self.blocks:
                block.compile(backend=compile_with)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Counting:
    """A backend that runs graphs as they are and counts them; with products, the matrix products of backward ones."""

    def __init__(self, products: bool = False):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        self.graphs = 0
        self.backward: list[int] = []

        def counted(graph, _):
            self.backward.append(sum(str(node.target) in PRODUCTS for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        aot = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=counted)
        self.backend = aot if products else self.plain

    def plain(self, graph, _):
        self.graphs += 1
        return graph.forward


def random_input(step: int) -> torch.Tensor:
    """Of a varying number of rows."""
    return torch.randn(2 + step % 3, 4, generator=torch.Generator().manual_seed(step))


def train(model, names, inputs=random_input, on_step=lambda step, freezer: None, rewrap=None) -> Freezer:
    """A training loop; names: what to freeze after each step. rewrap: a model that is not compiled has rounds too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    freezer = Freezer(model, find_components(model), optimizer, rewrap=rewrap)
    for step, now in enumerate(names):
        model(inputs(step)).backward()
        freezer.drop_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        freezer.freeze(now)
        on_step(step, freezer)
    return freezer


def alike(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("blocks", [2, 8])
def test_any_order_of_freezing_stays_within_the_limit_and_trains_as_without_compilation(blocks):
    counting = Counting()
    ours, eager = Blocks(blocks, counting.backend), Blocks(blocks)
    names = [component.name for component in find_components(eager)]
    random.Random(blocks).shuffle(names)
    last = names.pop()  # keeps training, or there would be no backward pass
    order = [names[i : i + blocks // 2] for i in range(0, len(names), blocks // 2)] + [[], []]
    graphs, frozen_at = [], {}

    def watch(step, freezer):
        graphs.append(counting.graphs)
        for name in freezer.decided:
            now = [p.detach().clone() for p in freezer.by_name[name].parameters]
            assert all(map(torch.equal, now, frozen_at.setdefault(name, now))), name

    freezer = train(ours, order, on_step=watch)
    train(eager, order, rewrap=lambda: None)
    alike(ours, eager)
    assert last not in freezer.applied
    assert len(frozen_at) == 4 * blocks - 1
    assert freezer.rounds_done == 7
    # Before the first round and after each: every pattern and the prefix, once for fixed and once for varying shapes.
    assert graphs[-1] <= 8 * 2 * (PATTERNS + 1)


def test_a_round_shrinks_the_compiled_backward_pass(drops):
    counting = Counting(products=True)
    model = Blocks(3, counting.backend)
    components = {component.name: component for component in find_components(model)}
    passes = []

    def watch(step, freezer):
        passes.append(list(counting.backward))
        counting.backward.clear()

    whole = [name for name in components if name.startswith("blocks.2.")]
    partly = ["blocks.1.q_proj", "blocks.1.up_proj"]
    freezer = train(model, [[], whole, partly, []], inputs=lambda step: random_input(0), on_step=watch)
    assert freezer.applied == {*whole, *partly}
    assert passes[0] == [8]  # of a whole block: for each matrix the gradient of the weight and of the input
    assert passes[1] == []
    assert sorted(passes[2]) == ([4, 8] if drops else [4])
    assert sorted(passes[3]) == ([4, 6, 8] if drops else [6])


def test_blocks_before_the_first_trainable_matrix_run_without_backward():
    counting = Counting(products=True)
    model = Blocks(3, counting.backend)
    names = [component.name for component in find_components(model) if component.layer < 2]
    train(model, [[], names, []], inputs=lambda step: random_input(0))
    assert counting.backward == [8, 7]  # the input of the third block needs no gradient any more


def test_torch_compile_around_the_whole_model_waits_for_rounds_too():
    counting = Counting(products=True)
    model = Blocks(2)
    whole = torch.compile(model, backend=counting.backend)
    names = [component.name for component in find_components(whole)]
    assert names == [component.name for component in find_components(model)]
    freezer = train(whole, [names[-1:], names[-2:-1], [], [], [], []], inputs=lambda step: random_input(0))
    assert freezer.rounds_done == 2
    assert counting.backward == [17, 16, 15]


def test_blocks_show_few_patterns_whole_ones_always():
    model = Blocks(40)
    components = find_components(model)
    decided = {c.name for c in random.Random(0).sample(components, 80)}
    whole = [c.name for c in components if c.layer == 7]
    decided.update(whole)
    assert flippable(model, components, decided) == decided  # nothing is compiled
    for block in model.blocks:
        block.compile(backend="eager")
    flipped = flippable(model, components, decided)
    assert flipped < decided
    assert flipped.issuperset(whole)
    patterns = {frozenset(c.kind for c in components if c.layer == i and c.name in flipped) for i in range(40)}
    assert frozenset() in patterns
    assert len(patterns) == PATTERNS


def batch_of_any_length(seed: int, family: str) -> dict:
    """Rows and lengths vary; every third batch holds no image. Of Molmo's family the batch names the windows."""
    full, rng = batch(seed), random.Random(seed)
    filler = torch.full((2, rng.randrange(5)), 7)
    rows = {name: torch.cat((full[name], filler), 1).repeat(1 + seed % 2, 1) for name in ("input_ids", "targets")}
    if seed % 3 == 2:
        return rows | {"input_ids": rows["input_ids"].clamp(max=29)}
    windows = {} if family == "nanovlm" else {"pool_index": grid_windows(2 + 2 * (seed % 2), 4, 2).flip(0)}
    return rows | windows | {"images": full["images"].repeat(1 + seed % 2, 1, 1, 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_compiles_without_graph_breaks_and_evaluation_compiles_nothing(family):
    from eval.evaluation import evaluating, mean_loss

    counting = Counting()
    model = make_model(**FAMILIES[family] | {"vit_n_blocks": 3 + (family != "nanovlm"), "lm_n_blocks": 3})
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.compile(backend=counting.backend)
    config = GradESConfig(vision_tau=ALWAYS, language_tau=NEVER, alpha=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = GradESMonitor(config, model, optimizer, 8, log=lambda line: None)
    for step in range(1, 9):
        torch._dynamo.utils.counters.clear()
        model(**batch_of_any_length(step, family))[1].backward()
        assert not torch._dynamo.utils.counters["graph_break"]
        monitor.after_backward(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.after_step(step)
        before = counting.graphs
        one = {"input_ids": torch.full((3, step + 7), 5), "targets": torch.full((3, step + 7), 6), "num_labels": 1,
               "label_positions": torch.arange(step)}  # fmt: skip
        assert mean_loss(model, [one], torch.device("cpu"), contextlib.nullcontext()) > 0
        with evaluating(model):
            model.generate(batch(step)["targets"], max_new_tokens=3)
        assert counting.graphs == before
    assert monitor.frozen_share("vision") == 1.0
    assert monitor.freezer.rounds_done > 0
    assert counting.graphs <= 30


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_over_a_round_as_without_compilation():
    from torch._inductor import config

    ours, eager = Blocks(1, "inductor"), Blocks(1)
    names = [component.name for component in find_components(eager)]
    order = [[], names[2:], []]
    # To try each kind of vector instructions inductor imports torch in a new process, six times: do without them.
    with config.patch({"cpp.vec_isa_ok": False}):
        train(ours, order, inputs=lambda step: random_input(0))
    freezer = train(eager, order, inputs=lambda step: random_input(0), rewrap=lambda: None)
    assert freezer.applied == set(names[2:])
    alike(ours, eager)
