"""Rollback gain: the features of images serve again wherever the vision tower has the weights that made them."""

import json

import pytest
import torch
from test_evaluation import held_out_evaluator
from test_rollback import NEVER, STEPS, cut, loop, row_losses
from test_rollback_scale import resumed
from tiny.grades import make_model, make_optimizer
from tiny.runs import arguments

import train
from eval.evaluation import Evaluator
from grades import GradESConfig, GradESMonitor
from grades.averaging import AveragedWeights
from training.arguments import parse_arguments

DECODER = NEVER | {"target_components": ["decoder"]}
ROW_PARTS = (True, False)
CHECKS = STEPS // 3 - 1  # that measure something


class Promises:
    """An evaluation that sees to it that what it is told of the vision tower is true."""

    def __init__(self):
        self.model = None
        self.told, self.later = [], []  # what it was told; at the end of each check
        self.new, self.before = {}, {}  # by part of the rows: the vision tower's weights

    def __call__(self, vision, first):
        weights = [p.detach().clone() for p in self.model.vision_encoder.parameters()]
        if vision == "new":
            self.new[first] = weights
        elif vision in ("same", "before"):
            made = {"same": self.new, "before": self.before}[vision][first]
            assert all(torch.equal(one, other) for one, other in zip(weights, made, strict=True))
        self.told.append((vision, first))
        return self.losses(vision, first)

    def losses(self, vision, first):
        return row_losses(self.model, first)

    def next_check(self, vision):
        self.later.append(vision)
        self.before = self.new if vision == "before" else {}
        if vision != "same":
            self.new = {}


def watched(config: dict, frozen_vision: bool = False):
    """(a loop, its evaluation)."""
    promises = Promises()
    run = loop(config, evaluate=promises)
    promises.model = run.model
    run.model.vision_encoder.requires_grad_(not frozen_vision)
    return run, promises


def calls(*vision: str) -> list:
    return [(one, first) for one in vision for first in ROW_PARTS]


@pytest.mark.parametrize("kept", ["average", "last"])
def test_the_vision_tower_put_back_is_that_of_the_check_before(kept):
    run, promises = watched(NEVER | {"freeze_to": kept})
    run.run()
    assert promises.told == calls("new", "same", "other") + calls("new", "same", "before") * (CHECKS - 1)
    assert promises.later == ["before"] * CHECKS


def test_a_vision_tower_of_which_nothing_is_watched_is_not_put_back():
    """Its norms and embeddings train."""
    run, promises = watched(DECODER)
    run.run()
    assert promises.told == calls("new", "same") * CHECKS
    assert promises.later == ["other"] * CHECKS
    run, promises = watched(DECODER, frozen_vision=True)
    run.run()
    assert promises.told == calls("new", "same") + calls("same", "same") * (CHECKS - 1)
    assert promises.later == ["same"] * CHECKS


def test_rows_that_the_check_before_left_out_are_computed():
    """Where a quarter of the rows leaves no doubt, the others are not evaluated."""
    run, promises = watched({"language_tau": 0.5, "vision_tau": 1e-12, "freeze_order": "together"})
    gains = iter([1.0, 1e-6, 1e-6, 1e-6, 1e-6])  # of the language tower put back: the first is far above its tau

    def losses(vision, first):
        height = 1.0 + (next(gains) if vision == "same" else 0.0)
        return [(20 * (height + i % 3 / 100), 20) for i in cut(range(80), first)]

    promises.losses = losses
    run.run()
    first, others = [("new", True), ("same", True)], [("new", False), ("same", False)]
    assert promises.told[:2] == first
    assert promises.told[2:8] == [*first, *others, ("before", True), ("other", False)]
    assert promises.told[8:] == [*first, *others, *calls("before")]


@pytest.mark.parametrize("kept", ["average", "last"])
def test_it_is_another_one_where_a_part_of_it_froze_to_its_last_values(kept):
    config = {"vision_tau": 0.37, "language_tau": 1e-12, "rollback_parts": "blocks", "freeze_order": "any",
              "freeze_to": kept, "patience": 1}  # fmt: skip
    run, promises = watched(config)
    run.run(6)
    assert len(run.monitor.frozen) == 4  # the first of two blocks
    promises.told.clear()
    run.run(9)
    assert ("before" in dict(promises.told)) == (kept == "average")


def test_it_is_another_one_where_a_part_of_it_froze_between_two_checks(tmp_path):
    history = loop(NEVER).run().monitor.history()
    names = [component["name"] for component in history["components"] if component["tower"] == "vision"][:4]
    history["events"] = [{"step": 7, "name": name, "value": 1.0, "tau": 1.0} for name in names]
    (tmp_path / "history.json").write_text(json.dumps(history))
    run, promises = watched(NEVER | {"replay_history": str(tmp_path / "history.json")})
    run.run()
    assert list(run.monitor.frozen.values()) == [7] * 4  # drawn among the vision tower's
    assert promises.told == calls("new", "same", "other") * 2 + calls("new", "same", "before") * (CHECKS - 2)


def test_it_is_another_one_after_a_check_in_which_nothing_could_go_back():
    run, promises = watched(NEVER)
    run.run(8)
    run.monitor.metric.older_at = run.averages.updates + 1  # as if no step had been made
    run.run(9)
    assert run.monitor.metric.older_at == 9
    promises.told.clear()
    run.run()
    assert promises.told == calls("new", "same", "other")


def test_it_is_another_one_where_some_of_it_has_no_average():
    """In a loop of one's own, whose averages leave its norms out."""
    model, promises = make_model(), Promises()
    promises.model, optimizer = model, make_optimizer(model)
    averages = AveragedWeights([p for p in model.parameters() if p.dim() > 1], optimizer, 0.5)
    run = loop(NEVER)
    run.model, run.optimizer = model, optimizer
    config = GradESConfig(metric="rollback", compute_interval=3, alpha=0.0, **NEVER)
    run.monitor = GradESMonitor(config, model, optimizer, STEPS, averages=averages, evaluate=promises)
    after_step = run.monitor.after_step
    run.monitor.after_step = lambda step: averages.update() or after_step(step)
    run.run()
    assert promises.told == calls("new", "same", "other") * CHECKS


def test_an_error_in_a_check_leaves_nothing_that_the_next_one_takes_for_its_own():
    run, promises = watched(NEVER)
    run.run(8)

    losses = promises.losses

    def fails(vision, first):
        if vision == "same":
            raise torch.OutOfMemoryError
        return losses(vision, first)

    promises.losses = fails
    with pytest.raises(torch.OutOfMemoryError):
        run.run(9)
    promises.losses = losses
    promises.told.clear()
    run.run()
    assert promises.told == calls("new", "same", "before")


def test_a_resumed_run_asks_for_the_same_features():
    whole, expected = watched(NEVER)
    whole.run()
    run, promises = watched(NEVER)
    run.run(8)
    again, later = resumed(run, NEVER), Promises()
    later.model, later.before = again.model, promises.before
    metric = again.monitor.metric
    metric.evaluate, metric.next_check = later, later.next_check
    again.run()
    assert promises.told + later.told == expected.told
    assert ("before", True) in later.told


def test_the_evaluator_gives_the_features_of_the_check_before():
    evaluator = held_out_evaluator(64)
    first = evaluator.row_losses(7, "new")
    evaluator.next_check("before")
    with torch.no_grad():
        for parameter in evaluator.model.vision_encoder.parameters():
            parameter.add_(0.3)
    now = evaluator.row_losses(7, "other")
    assert now != first
    assert all(features is None for features in evaluator.features)
    assert evaluator.row_losses(7, "before") == first
    images = sum(len(batch["images"]) for batch in evaluator.measured if batch["images"] is not None)
    assert sum(batch["cached_images"] for batch in evaluator.measured) == images > 0
    assert evaluator.row_losses(7, "before") == now  # as after a resume: there are none, so they are computed
    assert sum(batch["cached_images"] for batch in evaluator.measured) == images
    assert evaluator.row_losses(7, "new") == now
    assert sum(batch["cached_images"] for batch in evaluator.measured) == 0
    evaluator.next_check("same")
    with torch.no_grad():
        for parameter in evaluator.model.vision_encoder.parameters():
            parameter.sub_(0.3)
    assert evaluator.row_losses(7, "same") == now
    evaluator.next_check("other")
    assert all(features is None for features in evaluator.features + evaluator.before)


def test_a_run_passes_held_out_images_through_the_vision_tower_once_a_check(data, tmp_path, monkeypatch):
    passes, measure = [], Evaluator.row_losses

    def counted(self, rows, vision, first):
        made: list[int] = []
        hook = self.model.vision_encoder.register_forward_hook(lambda *_: made.append(1))
        found = measure(self, rows, vision, first)
        hook.remove()
        passes.append((vision, bool(made), sum(batch["cached_images"] for batch in self.measured) > 0))
        return found

    monkeypatch.setattr(Evaluator, "row_losses", counted)
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    flags = {"enable_grades": True, "metric": "rollback", "average_weights": 0.5, "lr_schedule": "constant",
             "alpha": 0.0, "rollback_rows": 3, "val_size": 5, "max_training_steps": 6, "compute_interval": 2,
             **NEVER}  # fmt: skip
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags))) == 0
    with_images = {(vision, made, spared) for vision, made, spared in passes if made or spared}
    assert with_images == {("new", True, False), ("same", False, True), ("other", True, False), ("before", False, True)}
