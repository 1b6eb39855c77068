"""The benchmarks on a tiny model: every row is there, and what does not depend on time is right."""

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest

from grades import find_components
from grades.config import METRICS
from scripts import bench_data, bench_freeze, bench_monitor, bench_step
from scripts.bench_common import Bench, parse, parser, time_checks

TINY = {
    "vit_img_size": 16, "max_img_size": 16, "vit_patch_size": 4, "vit_hidden_dim": 64, "vit_inter_dim": 128,
    "vit_n_heads": 2, "vit_n_blocks": 2, "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "lm_hidden_dim": 64,
    "lm_inter_dim": 128, "lm_n_heads": 2, "lm_n_kv_heads": 1, "lm_n_blocks": 2, "batch_size": 2, "turns_per_image": 1,
    "cache_rows": False, "dtype": "float32", "device": "cpu",
}  # fmt: skip
# Linears of a vision and of a language block: qkv, out, fc1, fc2; q, k, v, out, gate, up, down.
WEIGHTS = 2 * 64 * (3 * 64 + 64 + 2 * 128) + 2 * 64 * (2 * 64 + 2 * 32 + 3 * 128)


def flags(*more: str) -> list[str]:
    return [*(f"--{name}={value}" for name, value in TINY.items()), *more]


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table that ends the text, header first."""
    return [re.split(r"\s{2,}", line) for line in text.split("\n\n")[-1].strip().splitlines()]


@pytest.fixture
def bench():
    return Bench(*parse(parser(""), flags()))


def test_step(capsys):
    bench_step.main(flags("--steps=2", "--warmup_steps=1", "--compute_interval=5"))
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:-1])
    assert found["components"] == "22"
    assert found["micro-batch"] == "2 rows x 24 tokens, 2 images; 1 in a step"
    assert float(found["step"].removesuffix(" s")) > 0
    assert float(found["tokens/s"].replace(",", "")) > 0


def test_a_table_of_switches(capsys, monkeypatch):
    switches = {name: changes for name, changes in bench_step.SWITCHES.items() if "compile" not in changes}
    monkeypatch.setattr(bench_step, "SWITCHES", switches)  # inductor would take a minute
    bench_step.main(flags("--steps=1", "--warmup_steps=0", "--switches", "16", "40"))
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == ["switch", "tokens a row", "step (s)", "tokens/s", "TFLOP/s", "peak (GiB)"]
    assert [row[:2] for row in rows] == [[name, length] for length in ("16", "40") for name in switches]
    assert all(float(row[2]) > 0 and float(row[3].replace(",", "")) > 0 for row in rows)


@pytest.mark.parametrize("name", bench_step.SWITCHES)
def test_a_switch_is_on_in_the_benchmark(name, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda module: compiled.append(module))
    monkeypatch.setattr("training.setup._recomputed", lambda forward, *x: recomputed.append(1) or forward(*x))
    compiled, recomputed = [], []
    bench = bench_step.switched(*parse(parser(""), flags("--packing")), 24, bench_step.SWITCHES[name])
    bench.step()
    documents = bench.micro_batches[0].get("document_ids")
    assert (documents is not None and documents.unique().tolist() == [0, 1, 2, 3]) == ("--packing" in name)
    assert bool(compiled) == ("--compile" in name)
    assert bool(recomputed) == ("checkpointing" in name)


@pytest.mark.parametrize("packing", [False, True])
def test_data(capsys, packing):
    given = ["--packing", "--lm_max_length=256", "--max_sample_length=256"] if packing else ["--no_packing"]
    given += ["--random_rows=60", "--image_size", "24", "16", "--micro_batches=4", "--steps=2", "--step_s=0.001"]
    bench_data.main([flag for flag in flags("--gradient_accumulation_steps=2", *given) if "--device" not in flag])
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    number = {
        name: float(re.match(r"[\d.,]+", text)[0].replace(",", "")) for name, text in found.items() if "/s" in name
    }
    assert ("packer samples/s" in number) == packing
    assert all(value > 0 for value in number.values())
    fill = float(found["fill rate"].split("%")[0]) / 100
    assert (0.5 if packing else 0) < fill <= 1
    samples_a_row = float(found["samples/s"].split(", ")[1].removesuffix(" a row"))
    assert samples_a_row == pytest.approx(number["samples/s"] / number["rows/s"], rel=0.1)
    assert samples_a_row > 2 if packing else samples_a_row == 1
    if packing:  # 256 positions a row
        assert number["tokens/s"] == pytest.approx(fill * 256 * number["rows/s"], rel=0.1)
    mean_ms, longest_ms = re.match(r"mean ([\d.]+) ms, longest ([\d.]+) ms", found["wait a step"]).groups()
    assert 0 < float(mean_ms) <= float(longest_ms)
    waiting = float(re.search(r"\(([\d.]+)%", found["data is"])[1]) / 100
    assert waiting == pytest.approx(float(mean_ms) / (float(mean_ms) + 1), abs=0.02)


def test_monitor_costs(capsys):
    bench_monitor.main(flags("--samples", "1", "2", "64", "--rounds=1", "--compute_interval=10"))
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == ["metric", "read", "check (ms)", "of a step", "at interval 10", "held (MiB)"]
    watched = {(metric, read): cells for metric, read, *cells in rows}
    ours = {(metric, read) for metric in METRICS for read in ("exact", "1 in 2", "1 in 64")}
    references = {("weight_change", "naive foreach"), ("weight_change", "one sync a component")}
    assert set(watched) == ours | references
    assert len(rows) == len(watched)
    assert all(float(cells[0]) > 0 for cells in watched.values())
    held = {key: float(cells[-1]) for key, cells in watched.items()}
    snapshot = pytest.approx(4 * WEIGHTS / 2**20, abs=0.01)
    assert held["weight_change", "exact"] == held["gradient_change", "exact"] == snapshot
    assert held["weight_change", "naive foreach"] == held["weight_change", "one sync a component"] == snapshot
    assert held["gradient_norm", "exact"] == 0
    for metric in ("weight_change", "gradient_change"):
        assert held[metric, "1 in 64"] < held[metric, "1 in 2"] < held[metric, "exact"]


def test_a_check_is_timed_in_two_real_steps(bench):
    calls = []

    class Recorder:
        def gradients(self):
            return any(parameter.grad is not None for parameter in bench.model.parameters())

        def after_backward(self, step):
            calls.append(("after_backward", step, self.gradients()))

        def after_step(self, step):
            calls.append(("after_step", step, self.gradients()))

    step_s, check_s = time_checks(bench, {"a": Recorder()}, rounds=2)
    assert 0 < check_s["a"] < step_s
    expected = [(name, step) for step in (1, 2, 3, 4) for name in ("after_backward", "after_step")]
    assert calls[-8:] == [(name, step, name == "after_backward") for name, step in expected]


def test_references_measure_weight_change(bench):
    monitor = bench_monitor.make_monitor(bench, "weight_change", 1)
    references = [bench_monitor.NaiveForeach(monitor), bench_monitor.OneSyncEach(monitor)]
    monitor.metric.measure(monitor.components)
    bench.step()
    exact = list(monitor.metric.measure(monitor.components).values())
    for reference in references:
        assert reference.measure() == pytest.approx(exact, rel=1e-4)
        assert reference.measure() == [0.0] * len(exact)


def test_sampling_errors_of_a_real_run(capsys):
    bench_monitor.main(flags("--real_run=4", "--compute_interval=2", "--samples", "2", "64"))
    header, *rows = rows_of(capsys.readouterr().out)
    assert header[:2] == ["metric", "read"]
    assert [row[:2] for row in rows] == [[metric, read] for metric in METRICS for read in ("1 in 2", "1 in 64")]
    assert {checks for _, _, checks, *_ in rows} == {"2"}
    values = {metric: int(count) for metric, _, _, count, *_ in rows}
    assert values["gradient_norm"] == 2 * values["weight_change"]  # that has nothing to compare with at first
    for *_, median, p95, largest in rows:
        assert 0 < float(largest.removesuffix("%")) >= float(p95.removesuffix("%")) >= float(median.removesuffix("%"))


def test_relative_errors_are_of_what_both_measured():
    checks = [[None, 2.0], [3.0, 4.0]], [[None, 1.0], [None, 5.0]]
    sampled, exact = (SimpleNamespace(checks=[{"values": values} for values in found]) for found in checks)
    assert bench_monitor.relative_errors(sampled, exact).tolist() == pytest.approx([1.0, 0.2])


def test_freeze(capsys, monkeypatch):
    monkeypatch.setattr(bench_freeze, "peaks_gib", lambda arguments, settings: [1.0] * len(bench_freeze.STATES))
    bench_freeze.main(flags("--rounds=2", "--steps=1"))
    header, *rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == [state.name for state in bench_freeze.STATES]
    rows[0].insert(5, "")  # nothing is saved where nothing is frozen
    assert all(len(row) == len(header) for row in rows)
    columns = dict(zip(header[5:], list(zip(*rows, strict=True))[5:], strict=True))
    flops = [float(row[4]) for row in rows]
    assert flops[0] == 1.0
    for numbers in (
        flops,
        [float(cell) for cell in columns["gradients + optimizer (MiB)"]],
        [float(cell) for cell in columns["saved for backward (MiB)"]],
    ):
        assert all(after < before for before, after in pairwise(numbers)), numbers
    assert all(float(row[1]) > 0 for row in rows)
    assert all(cell.endswith("%") for cell in columns["time / FLOPs saved"][1:])


def test_a_state_ends_with_nothing_frozen(bench):
    components = find_components(bench.model)
    trainable = sum(parameter.requires_grad for parameter in bench.model.parameters())
    left = []
    for state in bench_freeze.STATES:
        with bench_freeze.frozen(bench, state):
            bench.step()
            left.append(sum(parameter.requires_grad for parameter in bench.model.parameters()))
        assert sum(parameter.requires_grad for parameter in bench.model.parameters()) == trainable
    assert left[0] == trainable
    assert left[1] == trainable - sum(len(c.parameters) for c in components if c.tower == "language")
    assert left[2] == trainable - sum(len(c.parameters) for c in components)
    assert left[3] < left[2]
    assert left[4] == 1


@pytest.mark.slow
def test_peaks_come_from_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(bench_freeze, "STATES", bench_freeze.STATES[-1:])
    (peak,) = bench_freeze.peaks_gib(*parse(parser(""), flags()))
    assert 0.05 < peak < 16


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (bench_step, ["--sequence_length=4"], "--sequence_length 4:"),
        (bench_monitor, ["--samples", "0"], "--samples 0:"),
        (bench_monitor, ["--real_run=19"], "--real_run 19:"),
        (bench_monitor, ["--real_run=40", "--samples", "1"], "--samples 1:"),
        (bench_freeze, ["--batch_sise=4"], "--batch_sise"),
    ],
)
def test_impossible_flags_are_named(module, given, message, capsys):
    with pytest.raises(SystemExit):
        module.main(flags(*given))
    assert message in capsys.readouterr().err
