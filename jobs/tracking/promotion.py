"""Promote a candidate to champion if it is better."""

from __future__ import annotations

from typing import Any

from jobs.tracking.comparison import Comparison, compare_folds, compare_folds_with_floor, compare_models
from jobs.tracking.models import CANDIDATE, CHAMPION, model_aliases, move_alias, resolve_model
from jobs.tracking.runs import start_run
from screformer.config import TrackingConfig
from screformer.predictor import Predictor

MOST_LOST = 0.01
"""Macro-F1, and balanced accuracy, that a model moved to another query may lose on cells of its own one."""


def _measured(
    candidate: Predictor, champion: Predictor | None
) -> tuple[str, str, dict[str, Any], Comparison | None]:
    """Metric, cells and numbers of a comparison: on shared folds if there are any, else cell by cell."""
    own = candidate.meta.get("folds")
    if champion is None:
        folds = compare_folds_with_floor(own, len(candidate.label_names))
    else:
        folds = compare_folds(own, champion.meta.get("folds"))
    if folds is not None:
        whose = "of the candidate's cross-validation" if champion is None else "of both cross-validations"
        return "macro-F1", f"the {folds['folds']} {folds['kind']} folds {whose}", folds, None
    old_groups = candidate.meta.get("move", {}).get("old_test_groups", [])
    new_groups = None
    if champion is not None and old_groups:
        new_groups = [group for group in candidate.meta["split"]["groups"]["test"] if group not in old_groups]
    comparison = compare_models(candidate, champion, among=new_groups)
    measured = _numbers(comparison)
    where = f"{comparison.num_cells:,} cells of {', '.join(comparison.groups)}"
    if new_groups is not None:
        measured["known_cells"] = _numbers(compare_models(candidate, champion, among=old_groups))
    return "balanced accuracy", where, measured, comparison


def _numbers(comparison: Comparison) -> dict[str, Any]:
    keys = ("difference", "low", "high", "num_cells", "accuracy", "macro_f1")
    return {key: getattr(comparison, key) for key in keys} | {"groups": list(comparison.groups)}


def promote(
    name: str, tracking: TrackingConfig, *, margin: float = 0.0, force: bool = False
) -> dict[str, Any]:
    """Compare candidate and champion, and move the alias if the candidate is better.

    If there is no champion yet, the candidate must beat the most frequent label for every cell.

    Args:
        name: Registered model.
        tracking: Where it is kept.
        margin: The lower end of the interval must be above this.
        force: Move the alias anyway. The version's tag and the run record the reason and that it was forced.

    Returns:
        `promoted`, `reason`, versions, and the numbers of the comparison if there was one.

    Raises:
        ValueError: There is no candidate, or the two cannot be compared and `force` is False.
    """
    aliases = model_aliases(name, tracking)
    if CANDIDATE not in aliases:
        raise ValueError(
            f"model {name} has no version with the alias {CANDIDATE!r}; register one with `python -m"
            f" jobs.finetune`"
        )
    version, before = aliases[CANDIDATE], aliases.get(CHAMPION)
    found: dict[str, Any] = {"model": name, "candidate": version, "champion_before": before, "forced": force}
    if before == version:
        return {**found, "promoted": False, "reason": f"version {version} is already the champion"}
    candidate, comparison = Predictor.load(resolve_model(f"models:/{name}/{version}", tracking)), None
    measured: dict[str, Any] = {}
    try:
        champion = Predictor.load(resolve_model(f"models:/{name}/{before}", tracking)) if before else None
        metric, where, measured, comparison = _measured(candidate, champion)
        better = measured["low"] > margin
        reason = (
            f"{metric} {measured['difference']:+.4f} (95 % interval {measured['low']:+.4f} to"
            f" {measured['high']:+.4f}) on {where}; the interval must be above {margin:+.4f}"
        )
        known = measured.get("known_cells")
        if known:
            gained = known["macro_f1"][CANDIDATE] - known["macro_f1"][CHAMPION]
            better = better and min(gained, known["difference"]) >= -MOST_LOST
            reason += (
                f"; macro-F1 {gained:+.4f} and balanced accuracy {known['difference']:+.4f} on"
                f" {known['num_cells']:,} cells of the query that the start model was trained on; each may"
                f" lose {MOST_LOST}"
            )
        if champion is None:
            reason = f"there is no champion; compared with the most frequent label for every cell: {reason}"
    except ValueError as error:
        if not force:
            raise
        better, reason = False, f"not compared: {error}"
    found |= {
        "promoted": better or force,
        "reason": reason,
        "champion": version if better or force else before,
    }
    if measured:
        found["comparison"] = measured
    config = candidate.config.merge({"tracking.uri": tracking.uri, "tracking.run_name": ""})
    with start_run(config, "promote", what=name) as run:
        run.set_tags({f"promote.{key}": value for key, value in found.items()})
        if comparison is not None:
            run.log_table(comparison.table, "promote/per_type.csv")
        if measured:
            run.log_metrics(
                {"promote/difference": measured["difference"], "promote/low": measured["low"]}, step=0
            )
        if found["promoted"]:
            move_alias(name, CHAMPION, version, reason={**found, "run": run.run_id}, tracking=tracking)
    return found
