"""When something freezes, trains again or ends: numbers in, decisions out."""

import math
from collections import Counter

import pytest

from grades.policy import (
    converged,
    count_below,
    enough_frozen,
    few_patterns,
    grace_steps,
    lasting,
    replay,
    round_number,
    to_unfreeze,
)


def test_the_grace_period_is_exactly_the_share_of_the_steps_rounded_up():
    assert [grace_steps(0.28, 1500), grace_steps(0, 10), grace_steps(0.3, 7), grace_steps(0.3, 10)] == [420, 0, 3, 3]


def test_what_is_below_tau_counts_up_what_is_not_starts_again_and_what_was_not_measured_waits():
    values = {"a": 0.1, "b": 1.0, "c": None, "d": math.nan, "e": 0.0}
    streaks = count_below({"a": 1, "b": 5, "c": 2}, values, dict.fromkeys(values, 1.0))
    assert streaks == {"a": 2, "b": 0, "c": 2, "d": 0, "e": 1}
    assert converged(values, streaks, patience=1) == ["a", "e"]
    assert converged(values, streaks, patience=2) == ["a"]  # c is there too, but was not measured now


def test_to_unfreeze_are_those_well_above_their_own_tau():
    values = {"a": 2.1, "b": 2.0, "c": None, "d": 2.1}
    assert to_unfreeze(values, {"a": 1, "b": 1, "c": 1, "d": 2}, factor=2) == ["a"]


def test_the_run_ends_at_the_share_and_never_with_nothing_frozen():
    cases = [(0, 4, 0.1), (1, 4, 0.5), (2, 4, 0.5), (3, 4, 1.0), (4, 4, 1), (7, 10, 0.7)]  # frozen, total, ratio
    assert [enough_frozen(*case) for case in cases] == [False, False, True, False, True, True]


@pytest.mark.parametrize("rounds", [1, 3, 8])
@pytest.mark.parametrize("total", [1, 7, 22, 258])
def test_never_more_rounds_than_asked_for_and_the_last_freezes_everything(rounds, total):
    totals = [total // 3, total - total // 3] if total > 1 else [total]
    for at_once in (1, 5, 100):
        for order in (range(len(totals)), reversed(range(len(totals)))):
            decided, applied = [0] * len(totals), [0] * len(totals)
            number = done = 0
            for tower in order:
                while decided[tower] < totals[tower]:
                    decided[tower] = min(totals[tower], decided[tower] + at_once)
                    if round_number(decided, totals, rounds) > number:
                        done, number, applied = done + 1, round_number(decided, totals, rounds), list(decided)
                assert applied[tower] == totals[tower] or rounds == 1, "a whole tower waits for nothing"
            assert 1 <= done <= rounds
            assert applied == totals


def test_few_patterns_cover_what_they_can():
    elements = {"a": 1, "b": 1, "c": 5}
    sets = [frozenset("a"), frozenset("ab"), frozenset("bc"), frozenset("bc"), frozenset()]
    assert few_patterns(sets, elements, 4) == sets
    assert few_patterns(sets, elements, 3) == [*map(frozenset, ("a", "a", "bc", "bc", ""))]
    assert few_patterns(sets, elements, 1) == [frozenset()] * 5
    assert few_patterns([], elements, 3) == []


EVENTS = [{"name": name, "step": step} for name, step in [("v3", 5), ("l0", 5), ("v1", 8), ("l2", 9), ("l3", 9)]]
TOWERS = {f"{tower[0]}{i}": tower for tower in ("vision", "language") for i in range(12)}


def test_replay_freezes_as_many_of_each_tower_at_the_same_steps_by_its_seed():
    draws = [replay(EVENTS, TOWERS, seed) for seed in range(20)]
    counted = {step: Counter(TOWERS[name] for name in names) for step, names in draws[0].items()}
    assert counted == {5: {"vision": 1, "language": 1}, 8: {"vision": 1}, 9: {"language": 2}}
    assert len({name for names in draws[0].values() for name in names}) == 5
    assert draws[3] == replay(EVENTS, dict(reversed(TOWERS.items())), 3)
    assert len({draw[8][0] for draw in draws}) > 5  # at random
    assert set(replay([{"name": name, "step": 1} for name in TOWERS], TOWERS, 0)[1]) == set(TOWERS)


def test_what_was_unfrozen_counts_only_where_it_froze_again():
    events = [
        {"name": "v0", "step": 2}, {"name": "l0", "step": 3}, {"name": "v0", "step": 4, "unfrozen": True},
        {"name": "l0", "step": 5, "unfrozen": True}, {"name": "v0", "step": 6},
    ]  # fmt: skip
    assert lasting(events) == [{"name": "v0", "step": 6}]
    assert {step: len(names) for step, names in replay(events, TOWERS, 0).items()} == {6: 1}
