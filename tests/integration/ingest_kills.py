"""Kill an ingest at each of its storage operations and check that the next ingest repairs the atlas.

`test_ingest_kill.py` runs this in a fresh process, because it forks, and TileDB must not be used before a
fork. Every `stride`-th operation is tried. Prints one line of JSON: the operations tried and what was wrong.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import tiledbsoma

from data_ingest import schema
from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from helpers.cells import atlas_content, differences

OPTIONS = IngestOptions(values_per_fragment=400, cells_per_chunk=16)


def in_child(work) -> int:
    """Run in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the status says it, and a child must not return into the parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(operation: int) -> None:
    """Let this process kill itself when it is about to do its n-th write or creation."""
    seen = 0

    def counted(original):
        def call(*arguments, **keywords):
            nonlocal seen
            if original.__name__ == "create" or {"w", "d"} & set(arguments[1:2]):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    for kind in (
        tiledbsoma.Collection,
        tiledbsoma.Experiment,
        tiledbsoma.Measurement,
        tiledbsoma.DataFrame,
        tiledbsoma.SparseNDArray,
    ):
        for name in ("open", "create"):
            setattr(kind, name, counted(getattr(kind, name)))


def check(folder: Path, files: list[Path], base: list[Path], operation: int, other: list[Path]) -> str:
    """Ingest `files` over `base` and kill it; ingest `other`, if any; ingest `files` again. Returns
    `finished`, `right`, or what is wrong."""
    atlas = folder / f"killed_{operation}"
    if base:
        shutil.copytree(folder / "before", atlas)

    def killed() -> None:
        kill_at(operation)
        ingest(files, str(atlas), OPTIONS)

    status = in_child(killed)
    if status == 0:
        return "finished"
    if status != -signal.SIGKILL:
        return f"operation {operation}: the ingest failed by itself ({status})"

    def compare() -> None:
        before, whole = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "whole"))
        cells = []
        if schema.find_atlas(str(atlas), schema.soma_context()):
            cells = [
                list(cell)
                for cell in atlas_content(str(atlas))[schema.OBS][["dataset_id", "obs_id"]].itertuples(
                    index=False
                )
            ]
        assert cells in (before, whole), (
            f"{len(cells)} cells visible after the kill, not {len(before)} or {len(whole)}"
        )
        if other:
            ingest(other, str(atlas), OPTIONS)
        ingest(files, str(atlas), OPTIONS)
        found, expected = atlas_content(str(atlas)), atlas_content(str(folder / "whole"))
        if not other:
            assert not differences(found, expected), f"differs in {differences(found, expected)}"
            return
        for place in (schema.VAR, schema.SUMMARY):
            columns = [column for column in found[place] if column != "soma_joinid"]
            a, b = (
                content[place][columns].sort_values(columns[0]).reset_index(drop=True)
                for content in (found, expected)
            )
            assert a.equals(b), f"{place} differs"
        a, b = (counts_by_name(content) for content in (found, expected))
        assert a == b, "counts differ"

    status = in_child(compare)
    if status < 0:
        # The process crashed in native code (seen once, in malloc, at load 15). For the atlas, this is just
        # one more killed ingest, so everything that holds after a kill must still hold.
        print(
            f"operation {operation}: the comparing process died of signal {-status}; trying again",
            file=sys.stderr,
        )
        status = in_child(compare)
    return "right" if status == 0 else f"operation {operation}: see above"


def counts_by_name(content) -> dict[tuple[str, str, str], float]:
    obs, var = (content[place].set_index("soma_joinid") for place in (schema.OBS, schema.VAR))
    return {
        (obs.dataset_id[cell], obs.obs_id[cell], var.feature_id[gene]): value
        for cell, gene, value in content[schema.X].itertuples(index=False)
    }


def main() -> None:
    folder, stride, start = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    base, files, other = (
        [folder / name for name in argument.split(",") if name] for argument in sys.argv[4:7]
    )

    def prepare() -> None:
        for name, steps in (("before", [base]), ("whole", [base, files])):
            for step in steps:
                if step:
                    ingest(step, str(folder / name), OPTIONS)
            cells = (
                atlas_content(str(folder / name))[schema.OBS][["dataset_id", "obs_id"]]
                if any(steps)
                else None
            )
            (folder / f"{name}.json").write_text(
                json.dumps([] if cells is None else cells.to_numpy().tolist())
            )

    assert in_child(prepare) == 0
    tried, wrong = [], []
    for operation in range(start, 1000, stride):
        result = check(folder, files, base, operation, other)
        if result == "finished":
            break
        tried.append(operation)
        if result != "right":
            wrong.append(result)
    print(json.dumps({"tried": tried, "wrong": wrong}))


if __name__ == "__main__":
    main()
