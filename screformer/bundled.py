"""Models that come with screformer: `bundled:NAME` stands for one wherever a model is asked for."""

from __future__ import annotations

from pathlib import Path

PREFIX = "bundled:"
DEFAULT = f"{PREFIX}blood"
"""The model that is used where none is named: major types of human blood cells."""
FOLDER = Path(__file__).parent / "pretrained"


def bundled_models() -> list[str]:
    """Names of the bundled models, such as `blood`."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []


def bundled_model(uri: str) -> Path:
    """The directory of a bundled model.

    Args:
        uri: Such as `bundled:blood`.

    Raises:
        ValueError: There is none of that name.
    """
    name = uri.removeprefix(PREFIX)
    if name not in bundled_models():
        raise ValueError(
            f"model {uri!r} does not come with screformer; there are"
            f" {', '.join(PREFIX + known for known in bundled_models()) or 'none'}"
        )
    return FOLDER / name
