"""Model card in Markdown, generated from a model's files: labels, training data, scores and limits."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from screformer.calibration_fit import MIN_PROBABILITY
from screformer.checkpoint import LoadedModel, load_model

_SHOWN_GROUPS = 12


def model_card(
    model_dir: str | Path,
    *,
    name: str,
    run_id: str = "",
    about: Sequence[str] = (),
    more: Mapping[str, list[str]] | None = None,
) -> str:
    """Write the card of a fine-tuned model.

    Args:
        model_dir: Model directory.
        name: Registered model.
        run_id: MLflow run that trained it; if empty, machine-specific facts are left out.
        about: Lines at the top.
        more: Further sections by title, placed after the labels.
    """
    loaded = load_model(model_dir)
    meta = loaded.meta
    parts = [
        f"# {_plain(name)}",
        "scReformer-BERT, a cell-type classifier for human single-cell RNA-seq. Input: raw counts, genes by"
        " Ensembl id or symbol;"
        " output: cell type with Cell Ontology id, calibrated probability and an unknown flag.",
        "\n".join(about),
        _section("Labels", _labels(loaded)),
        *(_section(title, lines) for title, lines in (more or {}).items()),
        _section("Trained on", _training(meta, run_id)),
        _section("Scores", _scores(meta)),
        _section("Confidence", _confidence(loaded)),
        _section("Limits", _limits(loaded)),
        _section("Software and architecture", _code(loaded)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: object) -> str:
    """Escape a name on one line, so that Markdown and HTML show it literally."""
    return html.escape(re.sub(r"([\\`*_\[\]#|~$]|^[+-])", r"\\\1", " ".join(str(text).split())), quote=False)


def _code_span(text: object) -> str:
    """A value as a Markdown code span, even if it contains backticks."""
    words = " ".join(str(text).split())
    longest = max(map(len, re.findall(r"`+", words)), default=0)
    if not longest:
        return f"`{words}`"
    fence = "`" * (longest + 1)
    return f"{fence} {words} {fence}"


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _labels(loaded: LoadedModel) -> list[str]:
    pairs = zip(loaded.labels["names"], loaded.labels["cl_ids"], strict=True)
    return [f"{len(loaded.labels['names'])} labels of {_code_span(loaded.labels['column'])}:", ""] + [
        f"- {_plain(label)} ({cl_id or 'no Cell Ontology term'})" for label, cl_id in pairs
    ]


def _training(meta: Mapping[str, Any], run_id: str) -> list[str]:
    query, split = meta.get("query", {}), meta.get("split", {})
    atlas = query.get("atlas", meta.get("atlas", {}))
    lines = []
    if run_id:
        lines.append(
            f"- atlas {_code_span(atlas.get('uri', 'not recorded'))} at timestamp_ms"
            f" {atlas.get('timestamp_ms', 'not recorded')}"
        )
        lines += [
            f"- {field}: {_code_span(query[field])}"
            for field in ("obs_filter", "var_filter", "is_primary_data")
            if field in query
        ]
        lines.append(
            f"- hash of the query's cells and genes:"
            f" `{query.get('hash', meta.get('query_hash', 'not recorded'))}`"
        )
    for part, cells in split.get("cells", {}).items():
        groups = split.get("groups", {}).get(part, [])
        shown = ", ".join(map(_plain, groups[:_SHOWN_GROUPS])) + (
            f" and {len(groups) - _SHOWN_GROUPS} more" if len(groups) > _SHOWN_GROUPS else ""
        )
        lines.append(f"- {part}: {cells:,} cells of {len(groups)} {_code_span(split['group_by'])} ({shown})")
    return [*lines, f"- MLflow run `{run_id}`"] if run_id else lines


def _scores(meta: Mapping[str, Any]) -> list[str]:
    rows = [f"| {metric} | {value:.4f} |" for metric, value in sorted(meta.get("metrics", {}).items())]
    lines = ["| metric | value |", "|---|---|", *rows, ""] if rows else []
    if meta.get("folds"):
        folds = meta["folds"]
        lines += [
            f"Cross-validation of these settings, {len(folds['names'])} {folds['kind']} folds (run"
            f" `{folds['run_id']}`). The final model was trained on the cells of all folds:",
            "",
            f"| metric | {' | '.join(f'fold {name}' for name in folds['names'])} |",
            f"|---|{'---|' * len(folds['names'])}",
            *(
                f"| {metric} | {' | '.join(f'{value:.4f}' for value in values)} |"
                for metric, values in folds["metrics"].items()
            ),
        ]
    return lines


def _confidence(loaded: LoadedModel) -> list[str]:
    calibration, measured = loaded.calibration, loaded.calibration.measured
    if measured is None:
        return [
            "Not calibrated: probabilities are the network's softmax output, and every cell gets its best"
            " label."
        ]
    augmented = ", augmented ones included," if calibration.by_depth else ""
    return [
        f"- temperature {calibration.temperature:.3f}, from {measured['cells']:,.0f} validation cells;"
        f" expected calibration error"
        f" {measured['ece_before']:.3f} before, {measured['ece_after']:.3f} after (on the same cells)",
        f"- cells with a score above {calibration.unknown_threshold:.4g} are `unknown`;"
        f" {measured['false_alarm_rate']:.0%} of these validation cells{augmented} are",
        f"- below a probability of {MIN_PROBABILITY:g}, the label is one of"
        f" {len(calibration.lineage.terms)} more general terms, or `unknown`",
    ]


def _limits(loaded: LoadedModel) -> list[str]:
    lines = [f"- {_plain(note)}" for note in loaded.meta.get("notes", [])]
    genes = (
        f"- knows {len(loaded.vocabulary):,} genes; other genes only count towards the library size, and a"
        " gene missing from the input is treated as unknown, not as 0"
    )
    return [*lines, genes, "- human cells only"]


def _code(loaded: LoadedModel) -> list[str]:
    code, tokens = loaded.meta.get("code", {}), loaded.config.tokens
    lines = [
        f"- screformer {code.get('screformer', 'not recorded')}, git `{code.get('git', 'not recorded')}`"
    ]
    if code.get("packages"):
        lines.append(
            "- " + ", ".join(f"{package} {version}" for package, version in code["packages"].items())
        )
    model = loaded.config.model
    network = (
        f"width {model.dim}, depth {model.depth}, {model.heads} heads, attention {model.attention}"
        if model.encoder == "reformer"
        else f"additive encoder of width {model.dim} on {model.input_genes:,} genes, without attention"
    )
    return [
        *lines,
        f"- tokens: {tokens.input_mode}, at most {tokens.max_genes} genes, {tokens.expression} expression in"
        f" {tokens.num_bins} bins",
        f"- network: {network}",
    ]
