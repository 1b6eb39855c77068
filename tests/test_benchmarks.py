"""The benchmarks on a tiny model: every row is there, and what does not depend on time is right."""

import functools
import re
from itertools import count, pairwise, product
from types import SimpleNamespace

import pytest
import torch
from tiny.tables import read_table

from grades import find_components
from grades.config import METRICS
from scripts import bench_cache, bench_data, bench_evaluation, bench_freeze, bench_monitor, bench_nanovlm, bench_step
from scripts.bench_common import Bench, make_parser, parse, time_checks
from training.step import clip_gradients

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


def values_of(text: str) -> dict[str, str]:
    """The lines that name a value."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if "  " in line)


def number(text: str) -> float:
    return float(re.search(r"[\d.,]+", text)[0].replace(",", ""))


@pytest.fixture
def bench():
    return Bench(*parse(make_parser(""), flags()))


@pytest.fixture
def work_clock():
    """A clock that counts calls of modules and its own readings: on a busy machine less work may take more seconds."""
    ticks: list[None] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: ticks.append(None))

    def read() -> float:
        ticks.append(None)
        return float(len(ticks))

    yield read
    hook.remove()


def test_step(capsys):
    bench_step.main(flags("--steps=2", "--warmup_steps=1", "--compute_interval=5"))
    found = values_of(capsys.readouterr().out)
    assert found["components"] == "22"
    assert found["micro-batch"].startswith("2 rows x 24 tokens, 2 images")
    assert number(found["tokens/s"]) == pytest.approx(48 / number(found["step"]), rel=0.2)


def test_a_table_of_switches(capsys, monkeypatch):
    switches = {name: changes for name, changes in bench_step.SWITCHES.items() if "compile" not in changes}
    monkeypatch.setattr(bench_step, "SWITCHES", switches)  # inductor would take a minute
    bench_step.main(flags("--steps=1", "--warmup_steps=0", "--switches", "16", "40"))
    rows = read_table(capsys.readouterr().out)
    assert [(row["tokens per row"], row["switch"]) for row in rows] == list(product(("16", "40"), switches))
    assert all(number(row[name]) > 0 for row in rows for name in ("step (s)", "tokens/s"))


def test_running_out_of_memory_is_a_row_of_the_table_of_batch_sizes(capsys, monkeypatch):
    make = bench_step.Bench

    def small_device(arguments, settings):
        if settings.train.batch_size == 3:
            raise torch.OutOfMemoryError("a device this small")
        return make(arguments, settings)

    monkeypatch.setattr(bench_step, "Bench", small_device)
    bench_step.main(flags("--steps=1", "--warmup_steps=0", "--batch_sizes", "1", "3", "2"))
    rows = read_table(capsys.readouterr().out)
    assert [(row["batch size"], row["peak (GiB)"]) for row in rows] == [("1", "–"), ("3", "out of memory"), ("2", "–")]
    assert number(rows[2]["step (s)"]) > 0


@pytest.mark.parametrize("name", bench_step.SWITCHES)
def test_a_switch_is_on_in_the_benchmark(name, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda module: compiled.append(module))
    monkeypatch.setattr("torch.compile", lambda function: function)
    monkeypatch.setattr("training.setup._recomputed", lambda forward, *x: recomputed.append(1) or forward(*x))
    compiled, recomputed = [], []
    bench = bench_step.switched(*parse(make_parser(""), flags("--packing")), 24, bench_step.SWITCHES[name])
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
    found = values_of(capsys.readouterr().out)
    assert ("packer samples/s" in found) == packing
    assert all(number(value) > 0 for name, value in found.items() if name.endswith("/s"))
    samples_per_row = number(found["samples/s"].split(",")[-1])
    assert samples_per_row > 2 if packing else samples_per_row == 1
    fill = number(found["fill rate"]) / 100
    assert (0.5 if packing else 0) < fill <= 1
    if packing:  # 256 positions per row
        assert number(found["tokens/s"]) == pytest.approx(fill * 256 * number(found["rows/s"]), rel=0.1)
    mean_ms, longest_ms = map(number, re.findall(r"[\d.]+ ms", found["wait per step"]))
    assert 0 < mean_ms <= longest_ms
    waiting = number(found["data is"].rpartition("(")[2]) / 100
    assert waiting == pytest.approx(mean_ms / (mean_ms + 1), abs=0.02)


def test_monitor_costs(capsys):
    bench_monitor.main(flags("--samples", "1", "2", "64", "--rounds=1", "--compute_interval=10"))
    rows = {(row["metric"], row["read"]): row for row in read_table(capsys.readouterr().out)}
    references = [("weight_change", "naive foreach"), ("weight_change", "one sync per component")]
    assert list(rows) == [*product(METRICS, ("exact", "1 in 2", "1 in 64")), *references]
    assert all(number(row["check (ms)"]) > 0 for row in rows.values())
    held = {key: number(row["held (MiB)"]) for key, row in rows.items()}
    copies = [("weight_change", "exact"), ("gradient_change", "exact"), *references]
    assert [held[key] for key in copies] == [pytest.approx(4 * WEIGHTS / 2**20, abs=0.01)] * 4
    assert held["gradient_norm", "exact"] == 0
    for metric in ("weight_change", "gradient_change"):
        assert held[metric, "1 in 64"] < held[metric, "1 in 2"] < held[metric, "exact"]


def test_a_check_is_timed_in_two_real_steps(bench, work_clock, monkeypatch):
    calls, seconds = [], Bench.seconds
    monkeypatch.setattr(Bench, "seconds", lambda self, work: seconds(self, work, work_clock))

    def record(name: str, step: int) -> None:
        calls.append((name, step, any(parameter.grad is not None for parameter in bench.model.parameters())))

    names = ("after_backward", "after_step")
    recorder = SimpleNamespace(**{name: lambda step, name=name: record(name, step) for name in names})
    step_s, check_s = time_checks(bench, {"a": recorder}, rounds=2)
    assert check_s["a"] == 4  # its calls in two steps, each the time of reading the clock
    assert step_s > 4
    assert calls[-8:] == [(name, step, name == "after_backward") for step in (1, 2, 3, 4) for name in names]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_references_measure_weight_change(bench, one_by_one):
    monitor = bench_monitor.make_monitor(bench, "weight_change", 1)
    reference = bench_monitor.Reference(monitor, one_by_one)
    monitor.metric.measure(monitor.components)
    bench.step()
    exact = list(monitor.metric.measure(monitor.components).values())
    assert reference.measure() == pytest.approx(exact, rel=1e-4)
    assert reference.measure() == [0.0] * len(exact)


def test_sampling_errors_of_a_real_run(capsys):
    bench_monitor.main(flags("--real_run=4", "--compute_interval=2", "--samples", "2", "64"))
    rows = read_table(capsys.readouterr().out)
    assert [(row["metric"], row["read"]) for row in rows] == list(product(METRICS, ("1 in 2", "1 in 64")))
    for row in rows:
        assert row["checks"] == "2"
        assert row["values"] == ("22" if row["metric"] == "weight_change" else "44")  # compares with the check before
        median, p95, largest = (number(row[name]) for name in ("median error", "p95", "largest"))
        assert 0 <= median <= p95 <= largest
        assert largest > 0


def test_relative_errors_are_of_what_both_measured():
    checks = [[None, 2.0], [3.0, 4.0]], [[None, 1.0], [None, 5.0]]
    sampled, exact = (SimpleNamespace(checks=[{"values": values} for values in found]) for found in checks)
    assert bench_monitor.relative_errors(sampled, exact).tolist() == pytest.approx([1.0, 0.2])


def test_freeze(capsys, monkeypatch):
    monkeypatch.setattr(bench_freeze, "peaks_gib", lambda arguments, settings: [1.0] * len(bench_freeze.STATES))
    bench_freeze.main(flags("--rounds=2", "--steps=1"))
    rows = read_table(capsys.readouterr().out)
    assert [row["frozen"] for row in rows] == [state.name for state in bench_freeze.STATES]
    assert rows[0]["FLOPs of full"] == "1.000"
    for name in ("FLOPs of full", "gradients + optimizer (MiB)", "saved for backward (MiB)"):
        assert all(number(after[name]) < number(before[name]) for before, after in pairwise(rows)), name
    assert all(number(row["step (s)"]) > 0 for row in rows)
    assert [row["time / FLOPs saved"][-1] for row in rows] == ["–", "%", "%", "%", "%"]


def test_compiled_each_state_says_when_its_first_step_has_paid(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    bench_freeze.main(flags("--rounds=1", "--steps=1", "--no_peaks", "--compile"))
    torch.compiler.reset()
    rows = read_table(capsys.readouterr().out)
    assert all(number(row["first step (s)"]) > 0 for row in rows)
    assert number(rows[0]["first step (s)"]) > 2 * number(rows[0]["step (s)"])  # compiling
    assert rows[0]["pays after (steps)"] == "–"
    assert bench_freeze.pays_after(3.0, 0.5, 1.0) == "5"
    assert bench_freeze.pays_after(3.0, 1.0, 1.0) == "–"


def test_a_state_ends_with_nothing_frozen(bench):
    components = find_components(bench.model)

    def trainable() -> int:
        return sum(parameter.requires_grad for parameter in bench.model.parameters())

    left, all_of_them = [], trainable()
    for state in bench_freeze.STATES:
        with bench_freeze.frozen(bench, state):
            bench.step()
            left.append(trainable())
        assert trainable() == all_of_them
    language = sum(len(c.parameters) for c in components if c.tower == "language")
    assert left[:3] == [all_of_them, all_of_them - language, all_of_them - sum(len(c.parameters) for c in components)]
    assert left[2] > left[3] > left[4] == 1


@pytest.mark.slow
def test_peaks_come_from_other_processes(monkeypatch):
    monkeypatch.setattr(bench_freeze, "STATES", bench_freeze.STATES[-1:])
    (peak,) = bench_freeze.peaks_gib(*parse(make_parser(""), flags()))
    assert 0.05 < peak < 16


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (bench_step, ["--sequence_length=4"], "--sequence_length 4:"),
        (bench_monitor, ["--samples", "0"], "--samples 0:"),
        (bench_monitor, ["--real_run=19"], "--real_run 19:"),
        (bench_monitor, ["--real_run=40", "--compute_interval=2", "--samples", "1"], "--samples 1:"),
        (bench_freeze, ["--batch_sise=4"], "--batch_sise"),
    ],
)
def test_impossible_flags_are_named(module, given, message, capsys):
    with pytest.raises(SystemExit):
        module.main(flags(*given))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (bench_cache, ["--steps=10", "--turn=6"], "--steps 10: must be at least twice --turn 6"),
        (bench_nanovlm, ["--nanovlm=.", "--rounds=1"], "--rounds 1:"),
        (bench_nanovlm, ["--nanovlm=.", "--new_tokens=1"], "--new_tokens 1:"),
        (bench_nanovlm, ["--nanovlm=nowhere"], "--nanovlm nowhere:"),
        (bench_evaluation, ["--output=nowhere", "--rows=0"], "--rows 0:"),
        (bench_evaluation, ["--output=nowhere", "--limit=0"], "--limit 0:"),
        (bench_evaluation, ["--output=nowhere", "--nanovlm=nowhere", "--limit=8", "--rounds=9"], "--rounds 9:"),
        (bench_evaluation, ["--output=nowhere", "--nanovlm=nowhere"], "--nanovlm nowhere:"),
    ],
)
def test_what_the_last_lines_could_not_work_with_is_refused_first(module, given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


THEIR_CONFIG = """
class VLMConfig:
    def __init__(self):
        self.lm_hidden_dim, self.of_their_own = 7, "kept"
"""
THEIR_MODEL = """
import torch
from data.processors import get_tokenizer
from models.config import VLMConfig

class VisionLanguageModel(torch.nn.Module):
    def __init__(self, cfg, load_backbone):
        super().__init__()
        self.cfg, self.tokenizer, self.seen = cfg, get_tokenizer(None), []
        self.MP, self.vision_encoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.decoder = torch.nn.Embedding(200, cfg.lm_hidden_dim)

    def forward(self, input_ids, images, attention_mask=None, targets=None):
        self.seen.append((input_ids, images, attention_mask, targets))
        return None, self.decoder(input_ids).square().mean()

    def generate(self, input_ids, images, max_new_tokens, greedy):
        for _ in range(max_new_tokens):
            self.decoder(input_ids)
"""


@pytest.fixture
def their_clone(tmp_path):
    """A folder laid out as nanoVLM's, with a model of the same interface."""
    (tmp_path / "models").mkdir()
    for name, text in {"__init__": "", "config": THEIR_CONFIG, "vision_language_model": THEIR_MODEL}.items():
        (tmp_path / "models" / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(("more", "lines"), [((), ["a step"]), (("--new_tokens=3",), ["first token", "later tokens"])])
def test_beside_nanovlm(their_clone, capsys, monkeypatch, work_clock, more, lines):
    monkeypatch.setattr(bench_nanovlm, "time", SimpleNamespace(perf_counter=work_clock))
    bench_nanovlm.main(flags("--nanovlm", str(their_clone), "--rounds=3", "--warmup_steps=1", *more))
    found = values_of(capsys.readouterr().out)
    for line in lines:
        ours, theirs, ratio = (float(n) for n in re.findall(r"(?:this|nanoVLM|ratio) ([\d.e+-]+)", found[line]))
        assert ours > 0
        assert ratio == pytest.approx(ours / theirs, rel=0.01, abs=0.001)  # as it is rounded


def test_later_tokens_that_took_no_time_have_no_rate(their_clone, capsys, monkeypatch):
    """On a busy machine the first token alone may take longer than all of them; here each takes as long."""
    monkeypatch.setattr(bench_nanovlm, "time", SimpleNamespace(perf_counter=count().__next__))
    bench_nanovlm.main(flags("--nanovlm", str(their_clone), "--rounds=3", "--warmup_steps=1", "--new_tokens=3"))
    found = values_of(capsys.readouterr().out)
    assert found["first token"].startswith("this 1 s, nanoVLM 1 s")
    assert found["later tokens"].startswith("cannot be told: in 3 of 3 rounds all 3 tokens took no longer")


def test_nanovlm_trains_on_the_same_batch_and_our_modules_stay(their_clone, bench):
    theirs = bench_nanovlm.TheirBench(their_clone, bench)
    before = theirs.model.decoder.weight.clone()
    theirs.step()
    ((ids, images, mask, targets),) = theirs.model.seen
    batch = bench.micro_batches[0]
    assert torch.equal(ids, batch["input_ids"])
    assert torch.equal(targets, batch["targets"])
    assert mask is None
    assert images.dtype == torch.float32
    assert images.shape == batch["images"].shape
    assert not torch.equal(before, theirs.model.decoder.weight)
    assert theirs.model.cfg.lm_hidden_dim == 64
    assert theirs.model.cfg.of_their_own == "kept"
    import models.vision_language_model

    assert "scripts" not in models.vision_language_model.__file__
    assert models.vision_language_model.VisionLanguageModel is type(bench.model)


def test_a_folder_that_is_no_clone_of_nanovlm(tmp_path, bench):
    with pytest.raises(FileNotFoundError, match="must be a clone"):
        bench_nanovlm.their_model(tmp_path, bench.settings.vlm)


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_gradients_are_clipped_as_torch_does(bench, max_norm):
    bench.backward()
    copies = [torch.nn.Parameter(p.grad.clone()) for p in bench.model.parameters() if p.grad is not None]
    for copy in copies:
        copy.grad = copy.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
    assert torch.equal(clip_gradients(bench.model, max_norm), norm)
    grads = [parameter.grad for parameter in bench.model.parameters() if parameter.grad is not None]
    assert all(torch.equal(grad, copy.grad) for grad, copy in zip(grads, copies, strict=True))
