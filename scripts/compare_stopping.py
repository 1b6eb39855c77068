"""When would each rule have ended a run? Read from runs that went to their full length and measured all the way.

    for seed in 0 1 2 3 4; do python train.py --enable_grades --vision_tau 1e-12 --language_tau 1e-12 \\
        --freeze_order any --alpha 0.1 --compute_interval 100 --eval_interval 100 --seed $seed \\
        --run_name curves_$seed; done
    python scripts/compare_stopping.py grades_output/curves_*

Rules: rollback gain as in configs/quickstart.yaml; each run at the ends of the others (is it more than a good mean?);
each run at their mean; classic early stopping on the averaged and on the last weights. Nothing freezes in these runs,
so that only the end is compared. Prints a table of the validation rows' exact match at the end.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades import policy
from grades.config import ROLLBACK_TAU
from grades.rollback import CERTAINTY
from scripts.runs import markdown_table
from training.early_stopping import EarlyStopping


@dataclass
class Curves:
    """What a run measured, by step."""

    name: str
    gains: dict[int, dict[str, tuple[float, float]]]  # part -> (gain, standard error), nats per 100 steps
    val: dict[int, dict]  # val/loss, val/loss_averaged, val/exact_match of the better weights

    @classmethod
    def read(cls, folder: Path) -> "Curves":
        """Raises ValueError for a folder without the measurements."""
        try:
            history = json.loads((folder / "grades_history.json").read_text(encoding="utf-8"))
            lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            gains = {check["step"]: check["gains"] for check in history["checks"] if check.get("gains")}
            val = {line["step"]: line for line in lines if line.get("val/exact_match") is not None}
        except OSError as error:
            raise ValueError(f"{folder}: must be the folder of a finished run ({error})") from None
        if not gains or not gains.keys() <= val.keys():
            raise ValueError(f"{folder}: needs --metric rollback, and an evaluation at each check")
        return cls(folder.name, gains, val)

    @property
    def last(self) -> int:
        return max(self.val)

    def end_by_gain(self, tau: float, patience: int) -> int:
        """The step at which each part's gain + error has been below tau for `patience` checks in a row."""
        bounds = {
            step: {part: gain + CERTAINTY * error for part, (gain, error) in gains.items()}
            for step, gains in self.gains.items()
        }
        return end_below(bounds, tau, patience) or self.last

    def end_by_early_stopping(self, key: str, delta: float, patience: int) -> int:
        """The step at which classic early stopping ends."""
        rule = EarlyStopping(delta, patience)
        for step, values in sorted(self.val.items()):
            rule.update(values[key])
            if rule.is_over:
                return step
        return self.last


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, at least two")
    parser.add_argument("--tau", type=float, default=ROLLBACK_TAU, help=f"nats per 100 steps (default: {ROLLBACK_TAU})")
    parser.add_argument("--patience", type=int, default=2, help="checks in a row below tau (default: 2)")
    parser.add_argument("--es_delta", type=float, default=0.0005, help="of early stopping, in nats (default: 0.0005)")
    parser.add_argument("--es_patience", type=int, default=3, help="of early stopping (default: 3)")
    given = parser.parse_args(argv)
    try:
        runs = [Curves.read(folder) for folder in given.folders]
    except ValueError as error:
        parser.error(str(error))
    if len(runs) < 2:
        parser.error("folders: must be two or more")
    ours = [run.end_by_gain(given.tau, given.patience) for run in runs]
    stopping = (given.es_delta, given.es_patience)
    rules = {
        "rollback gain": [[end] for end in ours],
        "at the end of another run (all pairs)": [ours[:i] + ours[i + 1 :] for i in range(len(runs))],
        "at their mean": [[nearest(run, statistics.mean(ours))] for run in runs],
        "early stopping, averaged weights": [
            [run.end_by_early_stopping("val/loss_averaged", *stopping)] for run in runs
        ],
        "early stopping, last weights": [[run.end_by_early_stopping("val/loss", *stopping)] for run in runs],
        "full length": [[run.last] for run in runs],
    }
    print(table(runs, rules))
    return 0


def end_below(measured: dict[int, dict[str, float]], tau: float, patience: int) -> int | None:
    """The step at which all parts' values have been below tau at `patience` checks in a row; None if never.

    measured: step -> part -> value.
    """
    streaks: dict[str, int] = {}
    for step, values in sorted(measured.items()):
        streaks = policy.count_below(streaks, values, dict.fromkeys(values, tau))
        if len(policy.converged(values, streaks, patience)) == len(values):
            return step
    return None


def nearest(run: Curves, step: float) -> int:
    """The evaluated step nearest to another one."""
    return min(run.val, key=lambda known: abs(known - step))


def table(runs: list[Curves], rules: dict[str, list[list[int]]]) -> str:
    """A line per rule. rules: for each run the steps at which the rule would have ended it."""
    lines = []
    for rule, ends in rules.items():
        found = [(end, run.val[end]) for run, own in zip(runs, ends, strict=True) for end in own]
        steps = [end for end, _ in found]
        matches = [100 * values["val/exact_match"] for _, values in found]
        losses = [min(values["val/loss"], values["val/loss_averaged"]) for _, values in found]
        lines.append([
            rule, f"{statistics.mean(steps):,.0f} ({min(steps):,}..{max(steps):,})", f"{statistics.mean(matches):.2f}",
            f"{min(matches):.2f}", f"{statistics.mean(losses):.4f}", f"{max(losses):.4f}",
        ])  # fmt: skip
    header = ["ends by", "steps", "exact match (%)", "worst (%)", "validation loss", "worst"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
