"""The pages: what they link to exists, and CI finds the command of the tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for folder in (".", "docs", "grades_output") for page in (ROOT / folder).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_names_the_command_of_the_tests():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^uv run pytest$", readme, re.MULTILINE)
    assert len(readme.splitlines()) <= 150
