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
    """Its settings as on the command line, or `reference`."""
    settings: dict[str, Any]

    def with_seed(self, seed: int) -> dict[str, Any]:
        """Overrides of one of its runs."""
        return {"train.seed": seed} | self.settings

    @property
    def of_the_study(self) -> dict[str, Any]:
        """Its settings that need their own folds."""
        own = touching("cells")
        return {name: value for name, value in self.settings.items() if setting_name(name) in own}


def variants(config: ExperimentConfig, axes: Sequence[str] = ()) -> list[Variant]:
    """The reference, then the variants of the recipe's axes, each checked.

    Args:
        config: The recipe.
        axes: Those to take; empty takes all.

    Raises:
        ValueError: An unknown axis, or settings that the configuration does not take.
    """
    known = config.ablation.axes
    if not known:
        raise ValueError(
            "ablation.axes is empty; give a recipe with axes, such as jobs/recipes/ablation.yaml"
        )
    for axis in axes:
        if axis not in known:
            raise ValueError(f"--axes: there is no axis {axis!r}; there is {', '.join(known)}")
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
    """The variants by the settings that need their own folds.

    None first, which is the reference's folds.
    """
    groups: dict[str, tuple[dict[str, Any], list[Variant]]] = {}
    for variant in listed:
        groups.setdefault(json.dumps(variant.of_the_study, sort_keys=True), (variant.of_the_study, []))[
            1
        ].append(variant)
    return list(groups.values())
