"""Training that ends early, at a NaN or on request; and checkpoints by time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.toy_training import NUM_CLASSES, NUM_GENES, join_group, toy_config, train
from screformer.checkpoint import load_model
from screformer.config import ExperimentConfig
from screformer.engine import build_engine
from screformer.engine_state import weights_norm
from screformer.model import ScReformer
from screformer.not_finite import NonFiniteError
from screformer.progress import Stopped
from screformer.training_checkpoint import damage, read_position

EVALUATED = {"train.max_steps": 12, "train.eval_every_steps": 4}


def _work(rank: int, world_size: int, store: str, out: str) -> None:
    join_group(rank, world_size, store)
    folder, found = Path(out), {}

    def run(name: str, task: str, config: dict[str, Any], **wishes: Any) -> Any:
        config = toy_config(**{"cluster.num_workers": world_size, **EVALUATED, **config})
        return train(config, task, rank, world_size, save_in=folder / name, **wishes)

    whole, _ = run("whole", "finetune", {})
    asked: list[int] = []

    def third_step() -> bool:
        asked.append(0)
        return rank == 1 and len(asked) == 3  # only one rank is asked

    with pytest.raises(Stopped) as stopped:
        run("stopped", "finetune", {}, stop_asked=third_step)
    found["stopped"] = stopped.value.step
    resumed, _ = run("resumed", "finetune", {}, resume=folder / "stopped" / "step-003")
    found["same"] = all(
        torch.equal(whole.weights[key], resumed.weights[key]) for key in whole.weights
    ) and len(whole.weights) == len(resumed.weights)
    # From here on, layers round in another way: ZeRO stage 3 replaces PyTorch's linear function for good.
    for stage in (0, 2, 3):
        for task, rate in (("finetune", 1e30), ("pretrain", 1e30)):
            name = f"nan-{task}-{stage}"
            with pytest.raises(NonFiniteError) as caught:
                run(name, task, {"train.lr": rate, "zero.stage": stage, "train.gradient_clipping": 0.0})
            found[name] = [str(caught.value), caught.value.joinids]
    asked.clear()
    run("timed", "finetune", {}, checkpoint_due=third_step)
    _, lines = run("slow", "finetune", {"train.max_steps": 4}, wait_s=0.3 if rank == 1 else 0.0)
    found["slow"] = [lines[0][f"ranks/{name}"] for name in ("slowest", "slowest_s", "others_s")]
    found["norm"] = _norm_with_nan_as_fill(toy_config(**{"cluster.num_workers": world_size, "zero.stage": 3}))
    if rank == 0:
        (folder / "out.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _norm_with_nan_as_fill(config: ExperimentConfig) -> float:
    """The norm of all weights at ZeRO stage 3 over all ranks, with NaN in the padding of the last rank."""
    model = ScReformer(config.model, config.tokens, num_genes=NUM_GENES, num_classes=NUM_CLASSES, seed=0)
    engine = build_engine(config, model, config.cluster.num_workers)
    filled = 0
    for param in engine.module.parameters():
        size = param.ds_tensor.numel()
        fill = (torch.distributed.get_rank() + 1) * size - param.ds_numel
        if fill > 0:
            param.ds_tensor.data[size - fill :] = math.nan
            filled += fill
    assert filled or torch.distributed.get_rank() == 0
    norm = torch.tensor(weights_norm(engine))
    engine.destroy()
    torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.SUM)
    return float(norm)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("ends")
    torch.multiprocessing.spawn(_work, (2, str(folder / "store"), str(folder)), nprocs=2)
    return json.loads((folder / "out.json").read_text()), folder


@pytest.mark.parametrize("task", ["finetune", "pretrain"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_first_nan_ends_training_and_is_never_saved(
    ends: tuple[dict[str, Any], Path], task: str, stage: int
) -> None:
    message, joinids = ends[0][f"nan-{task}-{stage}"]
    assert "became NaN or infinite at step" in message and "lower train.lr=1e+30" in message
    assert 0 < len(joinids) <= 8 and all(0 <= joinid < 37 for joinid in joinids)
    for checkpoint in (ends[1] / f"nan-{task}-{stage}").glob("step-*"):
        weights = load_model(checkpoint / "model").model.state_dict().values()
        assert all(math.isfinite(float(tensor.sum())) for tensor in weights)


def test_padding_of_the_last_rank_does_not_count(ends: tuple[dict[str, Any], Path]) -> None:
    assert 0 < ends[0]["norm"] < math.inf


def test_a_stop_saves_a_checkpoint_that_resumes_to_the_same_bits(
    ends: tuple[dict[str, Any], Path],
) -> None:
    found, folder = ends
    checkpoint = folder / "stopped" / "step-003"
    assert found["stopped"] == 3 and not damage(checkpoint), "one rank was asked, all stopped"
    assert read_position(checkpoint)["global_step"] == 3
    assert load_model(checkpoint / "model"), "before the first evaluation, it is the current model"
    assert found["same"]


def test_the_slowest_rank_is_found(ends: tuple[dict[str, Any], Path]) -> None:
    rank, slowest_s, others_s = ends[0]["slow"]
    assert rank == 1 and slowest_s > 0.3 + others_s / 2


def test_checkpoints_are_saved_between_evaluations(ends: tuple[dict[str, Any], Path]) -> None:
    saved = sorted(path.name for path in (ends[1] / "timed").iterdir())
    assert saved == ["step-003", "step-004", "step-008", "step-012"]
