"""The report of a run as users see it: made from the run's artifacts, opened in a real headless browser."""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from helpers.stores import new_store
from jobs.report import main
from jobs.reports.artifacts import ANNOTATED, log_baselines, log_confusion, log_per_class, log_test_cells
from jobs.reports.cell_map import layout
from jobs.reports.provenance import changed_settings
from jobs.tracking.runs import TrackedRun, start_run
from screformer.config import ExperimentConfig
from screformer.metrics import LabelCounts

TYPES = ["B cell", "T cell", "monocyte", "natural killer cell", "platelet & <rare>"]


def _log_run(run: TrackedRun) -> None:
    """Log a small fine-tuning run: five types, three donors, nine of ten predictions correct."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 120)
    predictions = np.where(rng.random(120) < 0.9, labels, rng.integers(0, 5, 120))
    counts = LabelCounts(5)
    np.add.at(counts.confusion_kk, (labels, predictions), 1)
    groups = {"train": ["d1", "d2"], "val": ["d3"], "test": ["d4", "d5"]}
    atlas = {"uri": "s3://atlases/blood-" + "x" * 60, "timestamp_ms": 1_750_000_000_000}
    run.log_identity(
        {
            "query": {
                "atlas": atlas,
                "obs_filter": "tissue_general == 'blood'",
                "var_filter": "",
                "is_primary_data": True,
                "hash": "ab" * 32,
            },
            "split": {
                "group_by": "donor_id",
                "cells": {"train": 900, "val": 100, "test": 120},
                "groups": groups,
            },
            "notes": ["labels with fewer than 10 training cells are left out: {'plasma cell': 3}"],
        }
    )
    for step in range(0, 100, 10):
        run.log_metrics(
            {"train/loss": 1 / (step + 1), "val/loss": 1.2 / (step + 1), "val/macro_f1": step / 100},
            step=step,
        )
    run.log_metrics({**counts.scores("test"), "best_step": 80.0, "data/cells_cut": 7.0}, step=100)
    log_confusion(run, counts.confusion_kk, TYPES, "test")
    log_per_class(run, counts.table(TYPES), "test")
    baselines = {"model": ["logistic regression"], "accuracy": [0.8], "macro_f1": [0.75]}
    log_baselines(run, pd.DataFrame(baselines))
    cells = pd.DataFrame(
        {"joinid": np.arange(120), "dataset_id": "set", "donor_id": rng.choice(["d4", "d5"], 120)}
    )
    cells = cells.assign(
        label=np.array(TYPES)[labels],
        prediction=np.array(TYPES)[predictions],
        confidence=rng.uniform(0.6, 1, 120),
    )
    cells["said"] = cells["prediction"].where(cells["confidence"] > 0.65, "unknown")
    cells["embedding"] = list((np.eye(5, 8)[labels] * 4 + rng.normal(size=(120, 8))).astype(np.float32))
    log_test_cells(run, cells)
    genes = pd.DataFrame(rng.random((60, 30)), columns=[f"gene{i}" for i in range(30)])
    run.log_table(genes.assign(type="B cell"), f"{ANNOTATED}/cells.csv")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    folder = tmp_path_factory.mktemp("run")
    config = ExperimentConfig().merge(
        {"tracking.uri": new_store(folder), "model.n_hashes": 2, "tracking.model_name": "blood"}
    )
    with start_run(config, "finetune") as started:
        _log_run(started)
    return started


@pytest.fixture(scope="module")
def page(run: TrackedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["--run", run.run_id, "--tracking-uri", run.tracking_uri, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium. Nothing is downloaded: both programs come from the system."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        assert os.environ.get("CI") != "true", (
            "CI tests the report in a browser; install Debian's chromium and chromium-driver"
        )
        pytest.skip("no chromium with chromedriver on PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("browser")
    for flag in (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
        " --disable-component-update"
        f" --disable-sync --no-first-run --disable-extensions --user-data-dir={profile}"
    ).split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver_path))
    try:
        yield driver
    finally:
        driver.quit()


def _open(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page.as_uri())


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_every_width_without_complaint(browser: Any, page: Path, width: int) -> None:
    _open(browser, page, width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.innerWidth") == width
    assert (
        browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        == 0
    )
    pictures = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.alt.length])"
    )
    assert len(pictures) >= 7 and all(
        complete and natural > 0 and shown > 0 and alt > 20 for complete, natural, shown, alt in pictures
    )
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(b => b.scrollWidth - b.clientWidth)"
    )
    assert max(boxes) > 500, "the wide table scrolls inside its own box"
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])"
    )
    assert (
        headings[0] == 1
        and headings.count(1) == 1
        and all(b - a <= 1 for a, b in zip(headings, headings[1:], strict=False))
    )
    links = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.hash))"
    )
    assert len(links) >= 5 and all(links)
    assert browser.execute_script("return document.querySelectorAll('nav').length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, page: Path, scheme: str) -> None:
    _open(browser, page, 1280, scheme)
    ground_of = """
        const ground = e => {
            const colour = getComputedStyle(e).backgroundColor;
            return colour !== 'rgba(0, 0, 0, 0)' ? colour : ground(e.parentElement);
        };
        const texts = 'p, h1, h2, h3, th, td, figcaption, a, dt, dd, li, code, footer, strong';
        return [...document.querySelectorAll(texts)].map(
            e => [e.tagName + '.' + e.className, getComputedStyle(e).color, ground(e)])"""
    found = {tuple(item) for item in browser.execute_script(ground_of)}
    assert len(found) > 8
    for what, colour, ground in found:
        assert _contrast(colour, ground) >= 4.5, (what, colour, ground)
    page_light = _luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (page_light > 0.9) if scheme == "light" else (page_light < 0.05)


def test_it_prints(browser: Any, page: Path) -> None:
    _open(browser, page, 1280, "dark")
    printed = base64.b64decode(browser.print_page())
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 3
    assert browser.get_log("browser") == []


def test_it_shows_what_the_run_logged(page: Path, run: TrackedRun) -> None:
    text = page.read_text()
    for said in (
        "Fine-tuning: blood",
        "120 cells of 2 donors",
        "logistic regression",
        "Each donor",
        "plasma cell",
        "model.n_hashes",
        "s3://atlases/blood",
    ):
        assert said in text
    assert (
        "the best baseline on the same cells" in text
        and "Principal components of the model" in text
        and "platelet &amp; &lt;rare&gt;" in text
    )
    assert not re.search(r'(src|href)="https?:', text)
    logged = Path(MlflowClient(run.tracking_uri).download_artifacts(run.run_id, "report.html"))
    assert logged.read_text() == text


def test_a_run_that_logged_little_has_a_report_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExperimentConfig().merge({"tracking.uri": new_store(tmp_path)})
    with pytest.raises(RuntimeError), start_run(config, "pretrain") as run:
        raise RuntimeError("out of memory")
    out = tmp_path / "report.html"
    assert main(["--run", run.run_id, "--tracking-uri", run.tracking_uri, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"run_id": run.run_id, "report": str(out)}
    text = out.read_text()
    assert "<h1>Pre-training: screformer</h1>" in text and "RuntimeError: out of memory" in text
    assert main(["--run", "0" * 32, "--tracking-uri", run.tracking_uri]) == 2
    assert "screformer report: run '" + "0" * 32 + "' is not in sqlite:" in capsys.readouterr().err
    assert main(["--run", run.run_id, "--tracking-uri", run.tracking_uri, "--out", "report.pdf"]) == 2
    assert "--out report.pdf must end in .html" in capsys.readouterr().err


def test_a_run_that_made_its_own_report_keeps_it(tmp_path: Path) -> None:
    with start_run(ExperimentConfig().merge({"tracking.uri": new_store(tmp_path)}), "crossval") as run:
        for name in ("report.html", "report.json"):
            (tmp_path / name).write_text(f"its own {name}")
            run.log_file(tmp_path / name)
    out = tmp_path / "out.html"
    assert main(["--run", run.run_id, "--tracking-uri", run.tracking_uri, "--out", str(out)]) == 0
    assert out.read_text() == "its own report.html"


def test_settings_that_differ_and_few_cells() -> None:
    changed = changed_settings(ExperimentConfig().merge({"model.n_hashes": 8}).to_dict())
    assert changed.to_numpy().tolist() == [["model.n_hashes", "8", str(ExperimentConfig().model.n_hashes)]]
    points, how = layout(np.random.default_rng(0).normal(size=(12, 4)))
    assert (points.shape, how) == ((12, 2), "Principal components")


@pytest.mark.slow  # compiling UMAP takes 20 s
def test_many_cells_are_laid_out_by_umap() -> None:
    groups = np.repeat([0, 1], 150)
    points, how = layout(
        (np.random.default_rng(0).normal(size=(300, 8)) + 20 * groups[:, None]).astype(np.float32)
    )
    assert (points.shape, how) == ((300, 2), "UMAP")
    centres = np.stack([points[groups == group].mean(axis=0) for group in (0, 1)])
    assert np.linalg.norm(points - centres[groups], axis=1).max() < np.linalg.norm(centres[0] - centres[1]), (
        "groups are apart"
    )


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2, from 1 to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)
