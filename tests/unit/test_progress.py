"""Progress lines printed during training."""

from jobs.training.progress import ProgressLines, SlowRank, duration


def test_lines_are_short_and_show_the_remaining_time() -> None:
    seconds = iter([0.0, 30.0, 60.0])
    lines = ProgressLines(300, clock=lambda: next(seconds))
    train = {"train/loss": 0.83124, "train/cells_per_s": 2120.4, "train/lr": 1e-4, "data/wait_share": 0.1}
    assert lines.line(train, 25) == "step  25/300  loss 0.831  2,120 cells/s  6 min left"
    val = {"val/loss": 0.213, "val/accuracy": 0.99, "val/macro_f1": 0.9691}
    assert lines.line(train | val, 50) == (
        "step  50/300  loss 0.831  2,120 cells/s  validation 0.213  macro-F1 0.969  5 min left"
    )
    assert lines.line(train, 300) == "step 300/300  loss 0.831  2,120 cells/s", "no time is left"
    ended = {"best_step": 60.0, "best_val/loss": 0.2, "best_val/macro_f1": 0.97, "test/macro_f1": 0.9}
    assert lines.line(ended, 300) == "best step 60  validation 0.2  macro-F1 0.970  test macro-F1 0.900"


def test_the_second_line_shows_the_time_of_an_epoch() -> None:
    lines = ProgressLines(100, steps_per_epoch=200, clock=iter([0.0, 30.0, 40.0, 50.0]).__next__)
    said = [lines.line({"train/loss": 1.0}, step) for step in (10, 20, 30)]
    assert said[1] == "step  20/100  loss 1  3 min left  (3 min an epoch)"
    assert "epoch" not in said[0] + said[2], "the first steps are slow, and once is enough"


def test_a_rank_that_stays_slow_is_reported_once() -> None:
    def metrics(rank: int, slowest_s: float, others_s: float) -> dict[str, float]:
        return {"ranks/slowest": float(rank), "ranks/slowest_s": slowest_s, "ranks/others_s": others_s}

    slow = SlowRank(["a", "b", "c"])
    said = [slow.line(metrics(2, 1.3, 0.5)) for _ in range(5)]
    assert said == ["", "", said[2], "", ""] and said[2] == (
        "rank 2 on node c is slow: 1.3 s a step to read cells and apply the network, the others 0.5 s, who"
        " wait for it; is that node busy or smaller?"
    )
    steady = [metrics(1, 0.9, 0.5), metrics(1, 0.06, 0.02), metrics(0, 1.3, 0.5), metrics(1, 1.3, 0.5), {}]
    assert not any(slow.line(each) for each in steady * 3), "a little slower, or each time another rank"


def test_a_resumed_run_counts_its_own_steps() -> None:
    seconds = iter([0.0, 10.0])
    lines = ProgressLines(100, done_steps=40, clock=lambda: next(seconds))
    assert lines.line({"train/loss": 1.0}, 50) == "step  50/100  loss 1  50 s left"


def test_the_longest_line_fits() -> None:
    lines = ProgressLines(100_000, clock=iter([0.0, 9e4]).__next__)
    metrics = {
        "train/loss": 0.00012345,
        "train/cells_per_s": 123_456.7,
        "val/loss": 0.00012345,
        "val/macro_f1": 0.5,
    }
    assert len(lines.line(metrics, 50_000)) <= 100
    assert [duration(seconds) for seconds in (40, 720, 12_240)] == ["40 s", "12 min", "3.4 h"]
