"""Mixtures of data sets: their shares over any stretch of samples, their settings, and resuming inside of them."""

import copy
import itertools
import json
import time
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data.mixture import MixtureError, mixture_of, sets_of, shares_of
from data.mixture_rows import MixtureRows, load_training_rows, mixture_lines
from data.order import EpochIndices, EpochOrder, MixtureOrder, row_visits, schedule, whole_parts
from data.pipeline import load_data
from data.splits import split_by
from tests.tiny.data import drawn, encoded, picture, row, same, tiny_train, tiny_vlm, write_rows
from training import preflight
from training.arguments import parse_arguments, read_recipe, read_values


def groups(**shares) -> list[dict]:
    """A group for each share, of one set of its name."""
    return [{"name": name, "share": share, "sets": [{"path": name}]} for name, share in shares.items()]


def rows_of(sets, sizes) -> MixtureRows:
    return MixtureRows(
        sets, [[row(name=f"{one.label}/{i}") for i in range(n)] for one, n in zip(sets, sizes, strict=True)]
    )


class BySubset:
    """So many rows of each subset, one subset after the other."""

    def __init__(self, **sizes: int):
        self.sizes = sizes

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def by_subset(self) -> dict[str, np.ndarray]:
        ends = np.cumsum(list(self.sizes.values()))
        parts = np.split(np.arange(len(self)), ends[:-1])
        return dict(zip(self.sizes, parts, strict=True))


def order_of(mixture, sizes, seed=0) -> MixtureOrder:
    cfg = tiny_train(mixture=mixture, seed=seed)
    return row_visits(rows_of(sets_of(cfg), sizes), cfg)


# No limit on the time of drawing, which a busy machine would exceed.
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_the_schedule_gives_each_its_share_of_the_first_n_and_of_any_window(parts):
    turns = schedule(tuple(parts))
    total = sum(parts)
    assert len(turns) == total
    assert np.bincount(turns, minlength=len(parts)).tolist() == parts
    counts = np.cumsum(np.eye(len(parts), dtype=int)[np.tile(turns, 2)], axis=0)  # [2 * total, sets]
    counts = np.concatenate([np.zeros((1, len(parts)), int), counts])
    excess = counts - np.arange(len(counts))[:, None] * np.array(parts) / total
    bound = 1 - 1 / max(2, 2 * len(parts) - 2)
    assert np.abs(excess).max() <= bound + 1e-9  # of the first n samples
    assert (excess.max(0) - excess.min(0)).max() <= 2 * bound + 1e-9  # of any window: a difference of two


def test_shares_go_with_the_square_root_of_the_size_inside_a_group():
    cfg = tiny_train(
        mixture=mixture_of(
            [
                {"name": "a", "share": "0.75", "sets": [{"path": "x"}, {"path": "y", "size": "1", "rate": 2}]},
                {"name": "b", "share": 0.25, "sets": [{"path": "x"}, {"path": "z", "name": ["one", "two"]}]},
            ]
        )
    )
    sets = sets_of(cfg)
    assert [one.label for one in sets] == ["x", "y", "x (2)", "z one two"]
    # group a: sqrt(9) to 2 * sqrt(1); group b: sqrt(9) to sqrt(4)
    assert shares_of(sets, [9, 100, 9, 4]) == pytest.approx([0.75 * 3 / 5, 0.75 * 2 / 5, 0.25 * 3 / 5, 0.25 * 2 / 5])
    assert whole_parts([0.6, 0.3, 0.1]) == (6, 3, 1)
    assert sum(whole_parts([1 / 3] * 3)) == 100_000
    assert min(whole_parts([1 - 1e-9, 1e-9])) == 1


def test_each_set_goes_through_its_own_epochs_and_no_sample_is_left_out_between_them():
    order = order_of(groups(big=0.7, small=0.3), [11, 3])
    keys = [key for epoch in range(4) for key in order.keys(epoch)]
    assert len(keys) == 4 * 14
    small = [key for key in keys if key[1] >= 11]
    for number in range(len(small) // 3):
        assert sorted(small[3 * number : 3 * number + 3]) == [(number, 11), (number, 12), (number, 13)]
    assert len({tuple(small[i : i + 3]) for i in range(0, 15, 3)}) == 5  # (epoch, row): another order each time
    batches = EpochOrder(order, 5)
    taken = [next(it) for it in [iter(batches)] for _ in range(11)]
    assert [key for batch in taken for key in batch] == keys[:55]
    for start in (1, 2, 3, 7):  # where an epoch ends inside a batch too
        assert next(iter(EpochOrder(order, 5, start))) == taken[start]
    assert order_of(groups(big=0.7, small=0.3), [11, 3], seed=1).keys(0) != order.keys(0)


@pytest.mark.parametrize(("sizes", "readers", "batch_size"), [([40, 3], 1, 4), ([11, 1], 2, 5), ([7, 9], 3, 100)])
def test_the_order_is_that_of_each_visit_by_itself(sizes, readers, batch_size):
    order = order_of(groups(a=0.7, b=0.3), sizes, seed=3)

    def slow(reader: int):
        """Whose turn it is, and that set's visit by its number: one sample after the other."""
        turns, begin = order.schedule, reader * len(order.schedule) // readers
        for taken in itertools.count():
            place = begin + taken
            number = turns[place % len(turns)]
            before = sum(turns[i % len(turns)] == number for i in range(begin, place))
            epoch, at = divmod(before * readers + reader, sizes[number])
            indices = order.indices[number]
            yield epoch, np.random.default_rng((3, number, epoch)).permutation(indices)[at]

    for reader in range(readers):
        found = [key for epoch in range(3) for key in order.keys(epoch, reader, readers)]
        assert found == list(itertools.islice(slow(reader), len(found)))
    keys = [key for epoch in range(30) for key in order.keys(epoch)]
    for start in (0, 1, 2):
        batches = list(itertools.islice(EpochOrder(order, batch_size, start), 2))
        first = start * batch_size
        assert [key for batch in batches for key in batch] == keys[first : first + 2 * batch_size]


def test_the_time_for_an_order_grows_with_its_rows_and_not_faster():
    began = time.process_time()
    batches = EpochOrder(EpochIndices(range(150_000), {}, 0), 1)
    assert sum(len(batch) for batch in itertools.islice(batches, 150_000)) == 150_000
    order = MixtureOrder(BySubset(big=299_980, small=20), sets_of(tiny_train(mixture=groups(big=0.7, small=0.3))), 0)
    assert len(order.keys(0)) == 300_000
    assert time.process_time() - began < 4


def test_readers_divide_the_visits_of_each_set_and_keep_to_the_shares_each():
    order = order_of(groups(a=0.5, b=0.3, c=0.2), [30, 20, 10])
    parts = [[key for epoch in range(3) for key in order.keys(epoch, reader, 3)] for reader in range(3)]
    for part in parts:
        for start in range(0, len(part) - 20):
            found = Counter("abc"[(index >= 30) + (index >= 50)] for _, index in part[start : start + 20])
            assert all(abs(found[name] - 20 * share) < 2 for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
    together = Counter(key for part in parts for key in part)
    assert max(together.values()) == 1  # (epoch of the set, row): none is visited by two
    assert {index for epoch, index in together if epoch == 0} == set(range(60))


def test_rows_name_their_sets_and_the_held_out_rows_are_of_all(tmp_path):
    cfg = tiny_train(mixture=groups(a=0.5, b=0.5))
    cfg.mixture[1]["sets"][0]["loss_weight"] = 0.2
    rows = rows_of(sets_of(cfg), [6, 4])
    assert [found["id"] for found in rows] == [*(f"a/{i}" for i in range(6)), *(f"b/{i}" for i in range(4))]
    assert ["loss_weight" in found for found in rows] == [False] * 6 + [True] * 4
    with pytest.raises(IndexError):
        rows[10]
    train, held_out, _ = split_by(rows, "row", 4, 0)
    order = MixtureOrder(train, sets_of(cfg), 0)
    assert {train[index]["id"] for _, index in order.keys(0)} <= {found["id"] for found in train}
    assert len(held_out) == 4
    lines = mixture_lines(train, cfg)
    assert ["50.000%" in line for line in lines] == [True] * 4
    assert ["loss weight 0.2" in line for line in lines] == [False, False, False, True]
    with pytest.raises(ValueError, match="--mixture: no training rows in b"):
        MixtureOrder(rows_of(sets_of(cfg), [6, 0]), sets_of(cfg), 0)
    folder = write_rows(tmp_path / "same", 5, text=lambda i: i == 3)
    twice = [{"name": "g", "share": 1.0, "sets": [{"path": str(folder)}, {"path": str(folder)}]}]
    rows = load_training_rows(tiny_train(mixture=twice))
    train, held_out, how = split_by(rows, "image", 2, 0)
    assert how.startswith("by image")
    assert len(held_out) == 2  # both rows of an image: one of each set
    assert {found["id"] for found in held_out}.isdisjoint(found["id"] for found in train)


def sets_on_disk(tmp_path) -> list[dict]:
    """Two groups of folders with 9, 6 and 5 rows; the last one has columns of its own."""
    for name, count in (("a", 9), ("b", 6)):
        write_rows(tmp_path / name, count, text=lambda i: i == 3)
    (tmp_path / "c").mkdir()
    for i in range(5):
        (tmp_path / "c" / f"{i}.png").write_bytes(encoded(picture(seed=i)))
    lines = [json.dumps({"bild": f"{i}.png", "frage": "what?", "antwort": "red"}) for i in range(5)]
    (tmp_path / "c" / "rows.jsonl").write_text("\n".join(lines))
    names = {"question": "frage", "answer": "antwort", "image": "bild"}
    return [
        {"name": "one", "share": 0.6, "sets": [{"path": str(tmp_path / "a")}]},
        {
            "name": "two",
            "share": 0.4,
            "sets": [{"path": str(tmp_path / "b")}, {"path": str(tmp_path / "c"), "columns": names, "rate": 0.5}],
        },
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_mixture_goes_on_with_the_same_batches(tmp_path, packing, workers):
    flags = {"packing": packing, "num_workers": workers, "val_size": 2, "batch_size": 1 if packing else 4}
    cfg = tiny_train(mixture=sets_on_disk(tmp_path), **flags)
    rows, vlm = load_training_rows(cfg), tiny_vlm(lm_max_length=128)
    cfg.max_sample_length = 128

    def reading(state=None, rank=0, ranks=1):
        data = load_data(rows, vlm, cfg, None, rank, ranks)
        if state:
            data.load_rank_states(state)
        data.start_reading()
        return data

    data = reading()
    drawn(data, 9)
    state = copy.deepcopy(data.state_dict())
    expected = drawn(data, 5)
    assert all(map(same, drawn(reading([state]), 5), expected))
    if not packing:  # two ranks make the batches of one with twice the batch_size
        cfg.batch_size = 2
        halves = [drawn(reading(rank=rank, ranks=2), 14)[9:] for rank in range(2)]
        for whole, one, other in zip(expected, *halves, strict=True):
            assert whole["ids"] == one["ids"] + other["ids"]


def test_a_file_and_a_recipe_say_the_same_and_settings_go_round(tmp_path):
    mixture = sets_on_disk(tmp_path)
    file, recipe = tmp_path / "mixture.yaml", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(mixture))
    recipe.write_text(yaml.safe_dump({"mixture": mixture, "train_dataset_path": "easy-vqa"}))
    by_flag = parse_arguments(["--mixture", str(file)])
    by_recipe = parse_arguments(["--config", str(recipe)])
    assert by_flag.train.mixture == by_recipe.train.mixture == mixture
    file.write_text(yaml.safe_dump({"mixture": mixture}))
    assert parse_arguments(["--mixture", str(file)]).train.mixture == mixture
    recipe.write_text(yaml.safe_dump(by_flag.as_dict()))
    assert read_values(read_recipe(recipe))[0]["mixture"] == mixture
    assert parse_arguments(["--config", str(recipe), "--mixture", "none"]).train.mixture == []
    assert by_flag.train.train_data == [str(tmp_path / name) for name in "abc"]
    assert preflight.path_problems(by_flag) == []


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ([], "must be a list of groups"),
        ({"a": 1}, "must be a list of groups"),
        ([{"name": "a", "sets": [{"path": "x"}]}], "group 1: has no share"),
        ([{"name": "a", "share": -1, "sets": [{"path": "x"}]}], "group 1 (a): share -1: must be a number > 0"),
        ([{"name": "a", "share": 1, "sets": []}], "group 1 (a): sets must be a list"),
        ([{"name": "a", "share": 1, "sets": ["x"]}], "group 1 (a), set 1: 'x' must be a mapping with path"),
        (
            [{"name": "a", "share": 1, "sets": [{"path": "x", "weight": 2}]}],
            "unknown weight: must be one of path, name",
        ),
        ([{"name": "a", "share": 1, "sets": [{"path": "x", "size": 1.5}]}], "size 1.5: must be a whole number > 0"),
        ([{"name": "a", "share": 1, "sets": [{"path": "x", "rate": "nan"}]}], "rate nan: must be a number > 0"),
        (groups(a=1) + groups(a=2), "2 groups are called a"),
    ],
)
def test_what_is_wrong_in_a_mixture_is_said(mixture, said):
    with pytest.raises(MixtureError) as error:
        mixture_of(mixture)
    assert said in str(error.value)


def test_flags_that_do_not_go_with_a_mixture_and_files_that_are_not_there(tmp_path, capsys):
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(groups(**{"nowhere/at/all": 1.0})))
    for words, said in (
        (["--mixture", "no.yaml"], "--mixture no.yaml: cannot be read"),
        (["--mixture", str(file), "--train_dataset_path", "x"], "--train_dataset_path x: must be left out"),
        (
            ["--mixture", str(file), "--train_dataset_name", "a", "b"],
            "--train_dataset_name ['a', 'b']: must be left out",
        ),
        (["--mixture", str(file), "--mixture_weights", "a=1"], "--mixture_weights {'a': 1.0}: must be empty"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(words)
        assert said in capsys.readouterr().err
    [problem] = preflight.path_problems(parse_arguments(["--mixture", str(file)]))
    assert problem == "--mixture nowhere/at/all: no such file or folder"
