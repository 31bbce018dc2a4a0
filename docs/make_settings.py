"""Print docs/settings.md, made from the fields and docstrings of `screformer/config.py`.

`make docs/settings.md` runs it; a test fails when the page is not current.
"""

from __future__ import annotations

from collections.abc import Sequence

from screformer.setting_docs import described, listed

HEAD = """# Settings

<!-- Made from screformer/config.py by `make docs/settings.md`; edit it there. -->

Give settings in a YAML recipe (`--config FILE`, `model: {dim: 64}`) or on the command line
(`model.dim=64`; `'search.space.train.lr=loguniform(1e-4, 1e-2)'` for a key of a mapping). What you leave out
keeps its default. A command refuses settings that have no effect in it.
"""


def page() -> str:
    """The text of docs/settings.md."""
    parts = [HEAD]
    for section in described():
        parts.append(f"## {section.name}\n\n{section.about}{_refused(section.refused_by)}\n")
        parts.append("| Setting | Values | Default | Meaning |\n|---|---|---|---|")
        for setting in section.settings:
            values = ", ".join(f"`{choice}`" for choice in setting.values) or setting.kind
            meaning = setting.meaning + _refused(setting.refused_by)
            row = (f"`{setting.name}`", values, f"`{setting.default}`", meaning)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        parts.append("")
    return "\n".join(parts)


def _refused(commands: Sequence[str]) -> str:
    return f" Refused by {listed([f'`{name}`' for name in commands])}." if commands else ""


if __name__ == "__main__":
    print(page(), end="")
