"""Models shipped with screformer, usable as `bundled:NAME` wherever a model is expected."""

from __future__ import annotations

from pathlib import Path

PREFIX = "bundled:"
DEFAULT = f"{PREFIX}blood"
"""The default model: major types of human blood cells."""
FOLDER = Path(__file__).parent / "pretrained"


def bundled_models() -> list[str]:
    """Names of the bundled models, for example `blood`."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []


def bundled_model(uri: str) -> Path:
    """The directory of a bundled model.

    Args:
        uri: For example `bundled:blood`.

    Raises:
        ValueError: There is no bundled model with that name.
    """
    name = uri.removeprefix(PREFIX)
    if name not in bundled_models():
        raise ValueError(
            f"model {uri!r} is not bundled with screformer; the bundled models are"
            f" {', '.join(PREFIX + known for known in bundled_models()) or 'none'}"
        )
    return FOLDER / name
