"""What feeds what in a model, as the autograd graph of its first forward passes in training tells.

The order in which modules are defined and named does not tell it: an embedding may feed later blocks too, a block may
be called several times, cross attention joins two lists of blocks, a wrapper may lead around a block.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from grades.compiled import is_compiled
from grades.components import Component, block_of, clean_name

OUTPUT = ""  # the station of what the model returns
UNKNOWN = "?"  # what needs a gradient and is no parameter of the model
# How many forward passes are read at most, while there are blocks that none of them has called: batches without an
# image leave the vision tower out.
MOST_FORWARDS = 256
Edge = tuple[Any, int]  # a node of the autograd graph and which of its outputs


class Feeds:
    """Which parameters and blocks feed which blocks, directly.

    `sources` names for each station the parameters and the other stations from which a path in the graph leads to it
    past no station in between. A station is the first output of a block that has components, of a lookup in a tied
    embedding, or OUTPUT. Reading takes a few milliseconds; it ends when each block was called once.
    """

    def __init__(self, model: nn.Module, components: Sequence[Component]) -> None:
        if isinstance(model, DistributedDataParallel):
            model = model.module  # the wrapper loses its hooks when it is made again
        self.blocks = list(dict.fromkeys(block for c in components if (block := block_of(c.name)[0])))
        self.sources: dict[str, set[str]] = {}
        # Whether something trains that the graph does not show: checkpointing with use_reentrant=True, and Unsloth's
        # own, compute without autograd in the forward pass, and train nothing where their input needs no gradient.
        self.is_hidden = False
        self.forwards = 0
        self._stations: dict[Edge, str] = {}  # in the current forward pass; holds its graph
        self._undo: list[Callable[[], None]] = []  # takes away what was put on modules for this pass
        # In a model that is compiled as a whole nothing can be seen.
        self._begins = None if is_compiled(model) else model.register_forward_pre_hook(self._begin)

    @property
    def is_known(self) -> bool:
        """Whether a forward pass was read whose graph shows all."""
        return OUTPUT in self.sources and not self.is_hidden

    def stop(self) -> None:
        """Read no more forward passes; leaves nothing on the model."""
        self._leave_pass()
        if self._begins is not None:
            self._begins.remove()
            self._begins = None

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        """A forward pass of the whole model begins: watch its blocks if it is one of training."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._leave_pass()  # one that an interrupt has ended
        self.forwards += 1
        modules, inside = _outermost(model), _inside_compiled(model)
        for path in (*self.blocks, *_tied_embeddings(model)):
            if path in modules and modules[path] not in inside:
                self._watch(path, modules[path])
        end = model.register_forward_hook(self._end, always_call=True)
        self._undo.append(end.remove)

    def _watch(self, path: str, module: nn.Module) -> None:
        call = module._compiled_call_impl
        if call is None:
            enters = module.register_forward_pre_hook(lambda module, inputs: self._enter(module))
            leaves = module.register_forward_hook(lambda module, inputs, output: self._mark(path, output))
            self._undo += [enters.remove, leaves.remove]
            return

        def watched(*args: Any, **kwargs: Any) -> Any:  # a hook would be compiled along
            self._enter(module)
            self._mark(path, output := call(*args, **kwargs))
            return output

        module._compiled_call_impl = watched
        self._undo.append(lambda: setattr(module, "_compiled_call_impl", call))

    def _enter(self, module: nn.Module) -> None:
        if not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            self.is_hidden = True

    def _mark(self, path: str, output: Any) -> None:
        first = next(iter(_tensors(output)), None)
        if first is not None and first.grad_fn is not None:
            self._stations.setdefault((first.grad_fn, first.output_nr), path)

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """The forward pass is over; output: None where an exception has ended it."""
        loss = output.get("loss") if isinstance(output, Mapping) else None
        returned = [t for t in _tensors(output if loss is None else loss) if t.grad_fn is not None]
        if returned:
            names, trains = _names(model), {clean_name(name) for name, p in model.named_parameters() if p.requires_grad}
            ends: dict[str, list[Edge]] = {OUTPUT: [(t.grad_fn, t.output_nr) for t in returned]}
            for (node, _), path in self._stations.items():
                ends.setdefault(path, []).extend(node.next_functions)
            for path, edges in ends.items():
                found = self._sources(edges, names)
                self.sources.setdefault(path, set()).update(found)
                own = {name for name in trains if path and name.startswith(f"{path}.")}
                self.is_hidden |= bool(own) and not own & found
        self._leave_pass()
        if self.is_hidden:
            self.sources = {}
        if self.is_hidden or self.forwards >= MOST_FORWARDS or self.sources.keys() >= {OUTPUT, *self.blocks}:
            self.stop()

    def _sources(self, edges: Iterable[Edge], names: Mapping[int, str]) -> set[str]:
        """The parameters and stations from which the graph leads to these edges past no other station."""
        found: set[str] = set()
        seen: set[Any] = set()
        todo = list(edges)
        while todo:
            node, number = todo.pop()
            if node is None or node in seen:
                continue
            if (node, number) in self._stations:
                found.add(self._stations[node, number])
                continue
            seen.add(node)
            if node.name() == "torch::autograd::AccumulateGrad":
                found.add(names.get(id(node.variable), UNKNOWN))
            self.is_hidden |= node.name().startswith("CheckpointFunctionBackward")
            todo.extend(node.next_functions)
        return found

    def _leave_pass(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._stations = [], {}

    def share(self) -> None:
        """Join what all ranks have seen, as each has other batches. All of them have to call this together."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, (self.state_dict(), self.is_hidden))
            for sources, is_hidden in of_ranks:
                self.load_state_dict(sources)
                self.is_hidden |= is_hidden

    def state_dict(self) -> dict[str, list[str]]:
        """What is known, in plain types."""
        return {station: sorted(names) for station, names in sorted(self.sources.items())}

    def load_state_dict(self, state: Mapping[str, Iterable[str]]) -> None:
        """Add what another run knew. The next forward pass is read all the same, as it may hide what trains."""
        for station, names in state.items():
            self.sources.setdefault(station, set()).update(names)


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by clean path; of a wrapper and what it wraps the wrapper."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        modules.setdefault(clean_name(path), module)
    return modules


def _inside_compiled(model: nn.Module) -> set[nn.Module]:
    """The modules within compiled ones, where nothing can be watched."""
    return {part for module in model.modules() if is_compiled(module) for part in module.modules() if part != module}


def _tied_embeddings(model: nn.Module) -> list[str]:
    """The paths of trainable embeddings whose weight another module holds too."""
    owners: dict[torch.Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return [
        clean_name(path) for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad and owners[module.weight] > 1
    ]  # fmt: skip


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in what a module returns."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _names(model: nn.Module) -> dict[int, str]:
    """The clean names of the parameters by id. What FSDP2 has gathered stands in the graph in place of its shards."""
    paths = dict(model.named_modules())
    names = {id(parameter): clean_name(path) for path, parameter in model.named_parameters()}
    places = {
        (id(module), key): names[id(parameter)]
        for module in paths.values()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    for module in paths.values():
        if hasattr(module, "_get_fsdp_state"):
            group = module._get_fsdp_state()._fsdp_param_group  # of FSDPModule; it has no public name for this
            for sharded in group.fsdp_params if group is not None else ():
                place = sharded._module_info
                whole = getattr(sharded, "_unsharded_param", None)
                names[id(whole)] = places.get((id(place.module), place.param_name), UNKNOWN)
    return names
