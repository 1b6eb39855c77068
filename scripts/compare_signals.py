"""Other signs of convergence beside rollback gain, on the checkpoints of runs that went to their full length.

    for seed in 0 1; do python train.py --enable_grades --vision_tau 1e-12 --language_tau 1e-12 --freeze_order any \\
        --alpha 0.1 --compute_interval 100 --eval_interval 100 --keep_checkpoints 100 --seed $seed \\
        --run_name curves_$seed; done
    python scripts/compare_signals.py grades_output/curves_*

At each checkpoint whose step was evaluated, for both towers:
gain: rollback gain of the tower + its error, nats per 100 steps; block, matrix: of the largest block, matrix alone;
drift: how far the averaged weights have moved since the checkpoint before, over the distance of the last weights from
their average; features: 1 - linear CKA (arXiv:1905.00414) of what the tower gives for the held-out images, with the
averaged weights of now and of the checkpoint before; noise: norm of the mean gradient over its error, of some batches.

Then each sign ends the runs as the gain does, once both towers have been below a threshold at two checkpoints in a row;
its threshold is the one with which they end after as many steps on average. A better sign leaves a lower loss.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.mixture_rows import load_training_rows
from data.pipeline import load_data
from eval.evaluation import Evaluator, RowLosses
from grades import find_components
from grades.averaging import AVERAGE, AveragedWeights
from grades.components import TOWERS, tower_of
from grades.config import ROLLBACK_TAU
from grades.rollback import CERTAINTY, PER_STEPS, find_parts, paired_difference
from models.vision_language_model import VisionLanguageModel
from scripts.compare_stopping import Curves, end_below
from scripts.runs import markdown_table
from training import setup
from training.arguments import parse_arguments
from training.checkpoint import STATE
from training.checkpoint_folder import step_folders, step_of
from training.step import forward_backward

PATIENCE = 2
SIGNS = ("gain", "block", "matrix", "drift", "features", "noise")
Weights = dict[str, torch.Tensor]


class Run:
    """A finished run with its checkpoints, and its signs: by name, by step, by tower."""

    def __init__(self, folder: Path, batches: int, rows: int | None = None):
        """batches: of training data, for the noise of the gradient. rows: held-out, for all else.

        Raises ValueError for a folder without checkpoints that follow each other.
        """
        self.curves = Curves.read(folder)
        # An interruption leaves a checkpoint between two evaluations.
        evaluated = (path for path in step_folders(folder) if step_of(path) in self.curves.val)
        self.folders = {step_of(path): path for path in evaluated}
        if len(self.folders) < 3:
            raise ValueError(f"{folder}: needs the checkpoints of all evaluations: --keep_checkpoints 100")
        settings = parse_arguments(["--config", str(folder / "config.yaml")])
        self.cfg, self.device = settings.train, torch.device("cpu")
        self.cfg.rollback_rows = rows or self.cfg.rollback_rows
        self.model = VisionLanguageModel.from_pretrained(str(next(iter(self.folders.values()))))
        setup.freeze_untrained(self.model, self.cfg)
        data = load_data(load_training_rows(self.cfg), settings.vlm, self.cfg, None)
        self.autocast = setup.autocast(self.device, self.cfg.dtype)
        self.evaluator = Evaluator(self.model, data, self.cfg, self.device, self.autocast)
        data.start_reading()
        self.batches = [next(data) for _ in range(batches)]
        self.components = find_components(self.model)
        self.signs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in SIGNS}

    def measure(self) -> None:
        """Fill `signs`, checkpoint after checkpoint."""
        before: tuple[int, Weights] | None = None
        for step, folder in sorted(self.folders.items()):
            last, average = self.read(folder)
            if before is not None:
                self.load(average)
                for name, values in self.signs_of(last, average, before[1], step - before[0]).items():
                    self.signs[name][step] = values
            before = step, average

    def read(self, folder: Path) -> tuple[Weights, Weights]:
        """(last weights, averaged weights) of a checkpoint."""
        model = VisionLanguageModel.from_pretrained(str(folder))
        setup.freeze_untrained(model, self.cfg)
        optimizer = setup.make_optimizer(model, self.cfg)
        saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        averages = AveragedWeights(model.parameters(), optimizer, self.cfg.average_weights)
        averages.load_state_dict(saved["states"]["averages"])
        named = dict(model.named_parameters())
        last = {name: parameter.detach().clone() for name, parameter in named.items()}
        return last, {n: averages.state[p].get(AVERAGE, p.detach()).clone() for n, p in named.items()}

    def load(self, weights: Weights, names: Sequence[str] | None = None) -> None:
        """Give the model these weights, or those of these names."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if names is None or name in names:
                    parameter.copy_(weights[name])

    def signs_of(self, last: Weights, average: Weights, before: Weights, steps: int) -> dict[str, dict[str, float]]:
        """Every sign of both towers; the model has the averaged weights, before and after. steps: since `before`."""
        found: dict[str, dict[str, float]] = {"drift": drift(last, average, before), "noise": self.noise()}
        losses = self.losses()
        now = self.features()

        def gain(names: Sequence[str]) -> float:
            self.load(before, names)
            value, error = paired_difference(losses, self.losses())
            self.load(average, names)
            return (value + CERTAINTY * error) * PER_STEPS / steps

        names = {parameter: name for name, parameter in self.model.named_parameters()}
        found |= {name: dict.fromkeys(TOWERS, 0.0) for name in ("gain", "block", "matrix")}
        for part in find_parts(self.model, self.components, "blocks"):
            kind = "gain" if part.name in TOWERS else "block"
            found[kind][part.tower] = max(found[kind][part.tower], gain([names[p] for p in part.parameters]))
        for component in self.components:
            value = gain([names[p] for p in component.parameters])
            found["matrix"][component.tower] = max(found["matrix"][component.tower], value)
        self.load(before)
        then = self.features()
        self.load(average)
        return found | {"features": {tower: 1 - linear_cka(now[tower], then[tower]) for tower in TOWERS}}

    def losses(self) -> RowLosses:
        """Of each held-out row."""
        return [row for batch in self.evaluator.row_losses(self.cfg.rollback_rows) for row in batch]

    def features(self) -> dict[str, torch.Tensor]:
        """What the vision tower and the language model's last norm give for the held-out rows: [positions, width]."""
        found: dict[str, list[torch.Tensor]] = {tower: [] for tower in TOWERS}
        places = {"vision": self.model.vision_encoder, "language": self.model.decoder.norm}
        hooks = [
            module.register_forward_hook(
                lambda module, given, output, kept=found[tower]: kept.append(output.float().flatten(0, -2))
            )
            for tower, module in places.items()
        ]
        self.losses()
        for hook in hooks:
            hook.remove()
        return {tower: torch.cat(parts) for tower, parts in found.items()}

    def noise(self) -> dict[str, float]:
        """Norm of the mean gradient of the training batches over its standard error: 1 is noise alone."""
        sums = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in self.model.named_parameters()}
        for batch in self.batches:
            forward_backward(self.model, [batch], self.device, self.autocast)
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    sums[name][0] += parameter.grad
                    sums[name][1] += parameter.grad**2
                    parameter.grad = None
        n, found = len(self.batches), {}
        for tower in TOWERS:
            mine = [pair for name, pair in sums.items() if tower_of(name) == tower]
            mean2 = sum(float((total / n).square().sum()) for total, _ in mine)
            variance = sum(float((squares / n - (total / n).square()).sum()) for total, squares in mine) * n / (n - 1)
            found[tower] = (mean2 / (variance / n)) ** 0.5
        return found

    def end(self, sign: str, threshold: float) -> int:
        """The step at which both towers' sign has been below the threshold at PATIENCE checkpoints in a row."""
        return end_below(self.signs[sign], threshold, PATIENCE) or self.curves.last


def drift(last: Weights, average: Weights, before: Weights) -> dict[str, float]:
    """By tower: the median over its weights of |average - before| / |last - average|."""
    ratios: dict[str, list[float]] = {tower: [] for tower in TOWERS}
    for name, now in average.items():
        tower, wander = tower_of(name), float((last[name] - now).norm())
        if tower in ratios and now.ndim > 1 and wander > 0:
            ratios[tower].append(float((now - before[name]).norm()) / wander)
    return {tower: statistics.median(values) for tower, values in ratios.items()}


def linear_cka(one: torch.Tensor, other: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of features, float32 [n, width]: 1 where they agree."""
    one, other = one.double() - one.double().mean(0), other.double() - other.double().mean(0)
    cross = (other.T @ one).norm() ** 2
    return float(cross / ((one.T @ one).norm() * (other.T @ other).norm()))


def threshold_for(measured: list[Run], sign: str, mean_steps: float) -> float:
    """The threshold with which the runs end after about mean_steps on average: of all values the one that fits best."""
    values = sorted({value for run in measured for both in run.signs[sign].values() for value in both.values()})
    return min(
        values, key=lambda value: abs(statistics.mean(run.end(sign, value * 1.0001) for run in measured) - mean_steps)
    )


def tables(measured: list[Run], tau: float) -> str:
    """How far each sign falls, and what ending by it would leave."""
    steps = sorted(set.intersection(*({*run.signs["gain"]} for run in measured)))
    shown = [steps[round(share * (len(steps) - 1))] for share in (0.1, 0.4, 0.7, 1.0)]
    header = ["sign", "tower", *(f"step {step:,}" for step in shown)]
    lines = []
    for sign in SIGNS:
        for tower in TOWERS:
            means = (statistics.mean(run.signs[sign][step][tower] for run in measured) for step in shown)
            lines.append([sign, tower, *(f"{mean:.4g}" for mean in means)])
    text = markdown_table(header, lines)
    wanted = statistics.mean(run.end("gain", tau) for run in measured)
    lines = []
    for sign in SIGNS:
        threshold = tau if sign == "gain" else threshold_for(measured, sign, wanted)
        ends = [run.end(sign, threshold * 1.0001) for run in measured]
        at_end = [run.curves.val[end] for run, end in zip(measured, ends, strict=True)]
        losses = [values["val/loss_averaged"] for values in at_end]
        lines.append([
            sign, f"{threshold:.3g}", f"{statistics.mean(ends):,.0f} ({min(ends):,}..{max(ends):,})",
            f"{statistics.mean(losses):.4f}", f"{max(losses):.4f}",
            f"{100 * min(values['val/exact_match'] for values in at_end):.2f}",
        ])  # fmt: skip
    header = ["ends by", "threshold", "steps", "validation loss", "worst", "worst exact match (%)"]
    return f"{text}\n{markdown_table(header, lines)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders with all their checkpoints")
    parser.add_argument("--tau", type=float, default=ROLLBACK_TAU, help=f"of the gain (default: {ROLLBACK_TAU})")
    parser.add_argument("--batches", type=int, default=8, help="training batches for the noise (default: 8)")
    parser.add_argument("--rows", type=int, help="held-out rows (default: the runs' --rollback_rows)")
    given = parser.parse_args(argv)
    if given.batches < 2:
        parser.error(f"--batches {given.batches}: must be >= 2, for the error of their mean")
    measured = []
    try:
        for folder in given.folders:
            measured.append(Run(folder, given.batches, given.rows))
            measured[-1].measure()
            print(f"measured {folder}", file=sys.stderr)
    except ValueError as error:
        parser.error(str(error))
    print(tables(measured, given.tau))
    return 0


if __name__ == "__main__":
    sys.exit(main())
