"""The prefix: what lies before the first matrix that still trains, to freeze so that the backward pass ends there."""

from collections.abc import Mapping, Sequence

import torch.nn as nn

from grades.components import Component, block_of
from grades.feeds import OUTPUT, Feeds
from grades.towers import Towers, clean_name


def frozen_prefix(
    model: nn.Module, components: Sequence[Component], feeds: Feeds
) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """What to freeze besides the components: parameters, and modules whose output is to be detached.

    A block is passed when no matrix in it trains and all that feeds it comes from passed blocks or freezes. What
    freezes is all else that trains (norms, embeddings, patch convolution) in passed blocks and before the blocks of a
    tower, where it feeds passed blocks alone. When all blocks of a tower before the language model are passed, all of
    the tower freezes, unless a matrix after the blocks trains. A tied embedding trains on as the head; where its lookup
    feeds passed blocks alone, the output of the lookup is to be detached.
    Nothing where `feeds` does not know what feeds what.
    """
    if not feeds.is_known:
        return [], []
    rule = _Rule(model, components, feeds.sources)
    rule.settle()
    cuts = [
        rule.modules[station] for station in rule.lookups() if not rule.sources[station] <= rule.free | rule.fixed
    ]  # fmt: skip
    return [rule.trainable[name] for name in rule.trainable if name in rule.free], cuts


class _Rule:
    """Finds the largest set of stations that fits the rule: all candidates, less what breaks it, until nothing does."""

    def __init__(self, model: nn.Module, components: Sequence[Component], sources: Mapping[str, set[str]]) -> None:
        self.sources = sources
        self.tower_of = Towers(model).of
        self.modules = {clean_name(path): module for path, module in model.named_modules()}
        named = [(clean_name(path), parameter) for path, parameter in model.named_parameters()]
        self.trainable = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.fixed = {name for name, _ in named} - self.trainable.keys()
        self.towers = {block: c.tower for c in components if (block := block_of(c.name)[0])}  # by block
        self.fed: dict[str, set[str]] = {}  # by parameter or station: the stations that it feeds
        for station, names in sources.items():
            for name in names:
                self.fed.setdefault(name, set()).add(station)
        self.passed = {station for station in sources if station != OUTPUT and not self._trains(station)}
        self.free: set[str] = set()  # names of parameters that freeze

    def _trains(self, station: str) -> bool:
        """Whether a matrix of this block trains, watched or not; False for a lookup."""
        return station in self.towers and any(_trains_as_matrix(p) for p in self.modules[station].parameters())

    def settle(self) -> None:
        """Find `passed` and `free`."""
        while True:
            self.free = {name for name in self.trainable if self._may_freeze(name)}
            self.free |= self._rest_of_towers()
            kept = {station for station in self.passed if self._is_passed(station)}
            if kept == self.passed:
                return
            self.passed = kept

    def _is_passed(self, station: str) -> bool:
        if station not in self.towers:  # a lookup
            return self._may_freeze(station)
        return self.sources[station] <= self.passed | self.free | self.fixed

    def _may_freeze(self, name: str) -> bool:
        """Whether a parameter, or lookup, feeds passed blocks alone and is a part of them or of their tower."""
        fed = self.fed.get(name, set())
        block, tower = block_of(name)[0], self.tower_of(name)
        own = block in self.passed if block in self.towers else {self.towers.get(b, tower) for b in fed} == {tower}
        return bool(fed) and fed <= self.passed and own

    def _rest_of_towers(self) -> set[str]:
        """What else trains in the towers before the language model of which all blocks are passed."""
        roots: dict[str, set[str]] = {}
        for block, tower in self.towers.items():
            if tower != "language":
                roots.setdefault(self._root_of(block, tower), set()).add(block)
        found: set[str] = set()
        for root, blocks in roots.items():
            if blocks <= self.passed:
                (tower,) = {self.towers[block] for block in blocks}
                # A projector inside the module of the tower is not part of the tower.
                own = {name for name in self.trainable if name.startswith(f"{root}.") and self.tower_of(name) == tower}
                if not any(_trains_as_matrix(self.trainable[name]) for name in own - self.free):
                    found |= own
        return found

    def _root_of(self, block: str, tower: str) -> str:
        """The path of the outermost module around the block that is of its tower."""
        parts = block.split(".")
        outer = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((path for path in outer if self.tower_of(path) == tower), block)

    def lookups(self) -> list[str]:
        """The passed lookups of tied embeddings."""
        return sorted(self.passed - self.towers.keys())


def _trains_as_matrix(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dim() >= 2
