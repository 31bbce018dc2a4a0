"""The generated pages docs/settings.md and docs/files.md are up to date."""

import runpy
from pathlib import Path

from screformer.config import sections
from screformer.settings import names

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_is_current_and_complete() -> None:
    page = runpy.run_path(str(DOCS / "make_settings.py"))["page"]()
    for section, cls in sections().items():
        for name in names(cls):
            (row,) = (line for line in page.splitlines() if line.startswith(f"| `{section}.{name}` |"))
            assert row.count(" | ") == 3 and len(row.rsplit(" | ", 1)[1]) > 10, row
    assert (DOCS / "settings.md").read_text() == page, "run `make docs/settings.md`"


def test_the_page_of_files_is_current_and_complete() -> None:
    page = runpy.run_path(str(DOCS / "make_files.py"))["page"]()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    unclear = [row for row in rows if not row.endswith(". |") or len(row) > 150]
    assert not unclear, "each file's docstring starts with one line that ends with a period"
    assert (DOCS / "files.md").read_text() == page, "run `make docs/files.md`"
