"""--watch_connector: the matrices that join the towers, as a tower of their own."""

import io
import json

import pytest
import torch.nn as nn
from tiny.grades import ALWAYS, FAMILIES, NEVER, make_model
from tiny.grades import train as train_tiny
from tiny.runs import arguments

import train
from grades import GradESConfig, find_components, policy
from grades.components import tower_of
from grades.plots import convergence, freezing
from grades.rollback import find_parts
from training.arguments import parse_arguments

MATRICES = {
    "nanovlm": ["MP.proj"],
    "molmo2": [
        *(f"MP.pooling.{name}_proj" for name in ("q", "k", "v", "out")),
        *(f"MP.{name}_proj" for name in ("gate", "up", "down")),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_its_matrices_are_found_where_they_are_asked_for(family):
    model = make_model(**FAMILIES[family])
    towers = find_components(model)
    found = find_components(model, connector=True)
    own = [component for component in found if component.tower == "connector"]
    assert sorted(component.name for component in own) == sorted(MATRICES[family])
    assert {p for component in own for p in component.parameters} == set(model.MP.parameters())
    assert {component.name for component in found} - {component.name for component in own} == {c.name for c in towers}
    assert {component.tower for component in towers} == {"vision", "language"}
    named = find_components(model, ["*_proj"], connector=True)
    assert {component.name for component in named} >= set(MATRICES[family]) - {"MP.proj"}


@pytest.mark.parametrize(
    ("name", "joins"),
    [
        ("model.multi_modal_projector.linear_1", True),
        ("model.visual.merger.mlp.0", True),
        ("MP.proj", True),
        ("model.audio_projector.linear", True),
        ("model.audio_tower.layers.0.fc1", False),
        ("vision_encoder.blocks.0.attn.out_proj", False),
        ("decoder.blocks.0.mlp.up_proj", False),
    ],
)
def test_names_of_what_joins_towers(name, joins):
    assert (tower_of(name) == "connector") == joins


def test_two_matrices_of_one_name_outside_of_blocks_are_told_apart():
    model = nn.ModuleDict(
        {"projector": nn.ModuleDict({side: nn.ModuleDict({"proj": nn.Linear(2, 2)}) for side in "ab"})}
    )
    found = find_components(model, connector=True)
    assert [(component.kind, component.layer) for component in found] == [
        ("projector.a.proj", 0), ("projector.b.proj", 0)
    ]  # fmt: skip


def test_it_has_a_tau_of_its_own_and_is_not_watched_otherwise():
    taus = {"vision_tau": NEVER, "language_tau": NEVER, "connector_tau": ALWAYS, "alpha": 0.2}
    watched = train_tiny({**taus, "watch_connector": True}, 6)
    assert set(watched.monitor.frozen) == {"MP.proj"}
    assert [watched.monitor.frozen_share(tower) for tower in ("vision", "connector", "language")] == [0, 1, 0]
    assert not any(p.requires_grad for p in watched.model.MP.parameters())
    assert "froze 1 of 1 connector matrices" in watched.lines[0]
    plain = train_tiny(taus, 6).monitor
    assert (plain.frozen, plain.frozen_share("connector")) == ({}, None)
    measured = train_tiny({**taus, "watch_connector": True, "freeze_connector": False}, 6).monitor
    assert (len(measured.checks), measured.frozen) == (6, {})
    assert {"grades/frozen_share_connector", "grades/weight_change_connector"} <= measured.scalars().keys()


def test_auto_finds_its_tau():
    config = {"vision_tau": NEVER, "language_tau": NEVER, "connector_tau": "auto", "alpha": 0.5}
    assert train_tiny({**config, "watch_connector": True}, 8).monitor.taus["MP.proj"] > NEVER
    assert not GradESConfig(connector_tau="auto").finds_taus()
    named = sorted(GradESConfig(watch_connector=True, connector_tau="auto", alpha=0).problems())
    assert [problem.split()[0] for problem in named] == ["alpha"]


def test_the_language_prefix_begins_once_vision_and_connector_are_frozen():
    taus = {"vision_tau": ALWAYS, "language_tau": NEVER, "connector_tau": ALWAYS, "alpha": 0.2}
    taus["target_components"] = ["vision_encoder", "MP", "decoder.blocks.0"]
    both = {**taus, "language_tau": ALWAYS}
    model = train_tiny({**both, "watch_connector": True}, 6).model
    assert not any(p.requires_grad for p in model.decoder.blocks[0].parameters())  # norms too
    model = train_tiny(both, 6).model
    assert model.decoder.blocks[0].norm1.weight.requires_grad


def test_it_freezes_between_the_towers_by_freeze_order_front():
    components = [("l", "language", "", 0), ("c", "connector", "", 0), ("v", "vision", "", 0)]
    assert policy.front(["l", "c", "v"], [], components) == ["v", "c", "l"]
    assert policy.front(["l", "v"], [], components) == ["v"]
    assert policy.front(["l"], ["c", "v"], components) == ["l"]


@pytest.mark.parametrize("level", ["towers", "prefixes", "blocks"])
def test_it_is_a_part_of_the_metric_rollback(level):
    model = make_model()
    parts = find_parts(model, find_components(model, connector=True), level)
    (part,) = [part for part in parts if part.tower == "connector"]
    assert (part.name, part.components, set(part.parameters)) == ("connector", ("MP.proj",), set(model.MP.parameters()))


def test_a_run_with_it(data, tmp_path):
    flags = {"enable_grades": True, "watch_connector": True, "connector_tau": 1e9, "vision_tau": 1e-9}
    words = arguments(data, tmp_path, "run", alpha=0.25, language_tau=1e-9, **flags)
    assert train.main(parse_arguments(words)) == 0
    folder = tmp_path / "out" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["frozen_share_connector"], summary["frozen_share_vision"]) == (1.0, 0.0)
    log = (folder / "log.txt").read_text()
    assert "4 vision and 7 language and 1 connector matrices" in log
    assert "connector 100.0 %" in log
    history = json.loads((folder / "grades_history.json").read_text())
    for figure in (convergence(history), freezing(history)):
        assert any("connector" in axis.get_title(loc="left") for axis in figure.axes)
        figure.savefig(io.BytesIO(), dpi=20)
