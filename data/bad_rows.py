"""--max_bad_rows and --strict: a run ends when too many of its rows cannot be used, before hours are lost."""

from __future__ import annotations

from data.drops import DROPPED
from models.config import TrainConfig

FIRST_ROWS = 1000  # of which max_bad_rows is a share
FEW = 4  # bad rows that are no share: of eight rows one is 12 %


class BadRowLimit:
    """Judges the rows that were read so far. `exceeded` says why the run is to end."""

    exceeded: str | None = None

    def __init__(self, cfg: TrainConfig, num_rows: float):
        """num_rows: of an epoch of training, infinite where it is not known."""
        self.cfg = cfg
        self.rows_to_judge = min(FIRST_ROWS, num_rows) if cfg.max_bad_rows < 1 else num_rows
        self.has_judged = False  # and found that the run may go on

    @property
    def reason(self) -> str | None:
        """The name of that end in summary.json; None where the run continues."""
        return "bad_rows" if self.exceeded else None

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come of it."""
        return self.exceeded is not None or (self.has_judged and not self.cfg.strict)

    def judge(self, rows: int, bad: int, bad_val: int) -> None:
        """rows: of training so far, used or not; bad: those of them, and of the validation rows, that are bad."""
        limit = self.cfg.max_bad_rows
        if self.cfg.strict and bad + bad_val:
            what = f"{bad} of {rows:,} training rows" if bad else f"{bad_val} of the validation rows"
            self.exceeded = f"--strict: {what} cannot be used; {DROPPED} names them"
        elif not self.has_judged:
            if bad > (max(FEW, limit * max(rows, self.rows_to_judge)) if 0 < limit < 1 else limit):
                self.exceeded = (
                    f"--max_bad_rows {limit:g}: {bad:,} of the first {rows:,} rows cannot be used; {DROPPED} names "
                    "them, a larger --max_bad_rows allows them"
                )
            self.has_judged = self.exceeded is None and rows >= self.rows_to_judge
