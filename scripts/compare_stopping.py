"""When would each rule have ended a run? Read from runs that went to their full length and measured all the way.

    for seed in 0 1 2 3 4; do python train.py --enable_grades --vision_tau 1e-12 --language_tau 1e-12 \\
        --freeze_order any --alpha 0.1 --compute_interval 100 --eval_interval 100 --seed $seed \\
        --run_name curves_$seed; done
    python scripts/compare_stopping.py grades_output/curves_*

Rules: rollback gain with the grace period of configs/quickstart.yaml; each run at the ends of the others (is it more
than a good mean?); each run at their mean; classic early stopping on the averaged and on the last weights. Nothing
freezes in these runs, so that only the end is compared. Prints a table of the validation rows' exact match at the end.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades import policy
from grades.components import TOWERS
from grades.config import ROLLBACK_TAU
from grades.rollback import CERTAINTY
from scripts.runs import markdown_table
from training.arguments import DEFAULT_RECIPE, parse_arguments
from training.early_stopping import EarlyStopping


@dataclass
class Curves:
    """What a run measured, by step."""

    name: str
    gains: dict[int, dict[str, tuple[float, float]]]  # part -> (gain, standard error), nats per 100 steps
    val: dict[int, dict]  # val/loss, val/loss_averaged, val/exact_match of the better weights
    interval: int  # steps between two checks
    total_steps: int

    @classmethod
    def read(cls, folder: Path) -> "Curves":
        """Raises ValueError for a folder without the measurements, or of a run that ended before its last step."""
        try:
            history, summary = (
                json.loads((folder / name).read_text(encoding="utf-8"))
                for name in ("grades_history.json", "summary.json")
            )
            lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            val = {line["step"]: line for line in lines if line.get("val/exact_match") is not None}
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: must be the folder of a finished run ({error})") from None
        gains = {check["step"]: check["gains"] for check in history["checks"] if "gains" in check}
        if not gains or not gains.keys() <= val.keys():
            raise ValueError(f"{folder}: needs --metric rollback, and an evaluation at each check")
        for step, found in gains.items():
            if missing := [tower for tower in TOWERS if tower not in found]:
                raise ValueError(f"{folder}: no gain of {' and '.join(missing)} at step {step:,}; --freeze_order any?")
        if summary["stop_reason"] != "max_training_steps":
            raise ValueError(f"{folder}: ended early ({summary['stop_reason']}); needs a run of full length")
        return cls(folder.name, gains, val, history["config"]["compute_interval"], history["total_steps"])

    @property
    def last(self) -> int:
        return max(self.val)

    def first_judged(self, alpha: float, monitor_grace: bool) -> int:
        """The step of the first gain that GradES would judge. Raises ValueError where the run did not measure it.

        Without monitor_grace the first check after the grace period has nothing to put back yet.
        """
        grace = policy.grace_steps(alpha, self.total_steps)
        first = (grace // self.interval + (1 if monitor_grace else 2)) * self.interval
        if first not in self.gains and first <= self.last:
            raise ValueError(f"--alpha {alpha}: {self.name} has no gain at step {first:,}, the first to be judged")
        return first

    def end_by_gain(self, tau: float, patience: int, first: int = 0) -> int:
        """The step at which each part's gain + error has been below tau for `patience` checks in a row.

        first: gains before this step do not count.
        """
        bounds = {
            step: {part: gain + CERTAINTY * error for part, (gain, error) in gains.items()}
            for step, gains in self.gains.items()
            if step >= first
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
    recipe = parse_arguments(["--config", str(DEFAULT_RECIPE)]).grades
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, at least two")
    parser.add_argument("--tau", type=float, default=ROLLBACK_TAU, help="nats per 100 steps")
    parser.add_argument("--patience", type=int, default=recipe.patience, help="checks in a row below tau")
    parser.add_argument("--alpha", type=float, default=recipe.alpha, help="grace period as a share of the steps")
    parser.add_argument("--es_delta", type=float, default=0.0005, help="of early stopping, in nats")
    parser.add_argument("--es_patience", type=int, default=3, help="of early stopping")
    given = parser.parse_args(argv)
    if not 0 <= given.alpha < 1:
        parser.error(f"--alpha {given.alpha}: must be in [0, 1)")
    try:
        runs = [Curves.read(folder) for folder in given.folders]
        require_same_steps(runs)
        firsts = [run.first_judged(given.alpha, recipe.monitor_grace) for run in runs]
    except ValueError as error:
        parser.error(str(error))
    if len(runs) < 2:
        parser.error("folders: must be two or more")
    ours = [run.end_by_gain(given.tau, given.patience, first) for run, first in zip(runs, firsts, strict=True)]
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


def require_same_steps(runs: list[Curves]) -> None:
    """Raises ValueError where runs were measured or evaluated at different steps."""
    one = runs[0]
    for other in runs[1:]:
        if (one.val.keys(), one.gains.keys()) != (other.val.keys(), other.gains.keys()):
            raise ValueError(f"{other.name}: was measured at other steps than {one.name}; compare them apart")


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
