"""The variants of an ablation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from screformer.config import ExperimentConfig, setting_name, touching
from screformer.settings import parse_override

REFERENCE = "reference"


class Variant(NamedTuple):
    """One row of an ablation."""

    axis: str
    name: str
    """Its settings as given on the command line, or `reference`."""
    settings: dict[str, Any]

    def with_seed(self, seed: int) -> dict[str, Any]:
        """Overrides of one of its runs."""
        return {"train.seed": seed} | self.settings

    @property
    def of_the_study(self) -> dict[str, Any]:
        """Its settings that require separate folds."""
        own = touching("cells")
        return {name: value for name, value in self.settings.items() if setting_name(name) in own}


def variants(config: ExperimentConfig, axes: Sequence[str] = ()) -> list[Variant]:
    """The reference, then the variants of the recipe's axes, each checked.

    Args:
        config: The recipe.
        axes: Axes to use; empty uses all.

    Raises:
        ValueError: An unknown axis, or invalid settings.
    """
    known = config.ablation.axes
    if not known:
        raise ValueError(
            "ablation.axes is empty; use a recipe with axes, for example jobs/recipes/ablation.yaml"
        )
    for axis in axes:
        if axis not in known:
            raise ValueError(f"--axes: unknown axis {axis!r}; choose from {', '.join(known)}")
    found = [Variant(REFERENCE, REFERENCE, {})]
    for axis in axes or known:
        for text in known[axis]:
            try:
                settings = dict(parse_override(part) for part in text.split())
                config.merge(settings, command="ablate")
            except ValueError as error:
                raise ValueError(f"ablation.axes.{axis}: {text!r}: {error}") from error
            found.append(Variant(axis, text, settings))
    return found


def by_folds(listed: Sequence[Variant]) -> list[tuple[dict[str, Any], list[Variant]]]:
    """The variants, grouped by the settings that require separate folds.

    None comes first: the reference's folds.
    """
    groups: dict[str, tuple[dict[str, Any], list[Variant]]] = {}
    for variant in listed:
        groups.setdefault(json.dumps(variant.of_the_study, sort_keys=True), (variant.of_the_study, []))[
            1
        ].append(variant)
    return list(groups.values())
