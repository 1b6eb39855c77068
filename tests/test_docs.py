"""The pages: what they link to exists, and CI finds the command of the tests."""

import re
import shlex
from pathlib import Path

import pytest

from data.mixture_rows import load_training_rows
from data.splits import split_by
from training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for folder in (".", "docs", "grades_output") for page in (ROOT / folder).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readmes_own_rows_can_be_split_as_its_command_says(tmp_path, monkeypatch):
    """The example's one row leaves none for validation."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row, command = re.search(
        r"^echo '(.+)' > rows\.jsonl\nuv run python train\.py (.+)$", readme, re.MULTILINE
    ).groups()
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    cfg = parse_arguments(shlex.split(command)).train
    rows, held_out, _ = split_by(load_training_rows(cfg), cfg.split_by, cfg.val_size, cfg.seed)
    assert (len(rows), len(held_out), rows[0]["texts"][0]["assistant"]) == (1, 0, "A cat.")


def test_the_readme_names_the_command_of_the_tests():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^uv run pytest$", readme, re.MULTILINE)
    assert len(readme.splitlines()) <= 150
