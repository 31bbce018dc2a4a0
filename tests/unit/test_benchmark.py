"""The benchmarks of attention and step run on small sizes and say what the README's tables need."""

import json
from dataclasses import replace

import pytest
import torch

from jobs.benchmark.__main__ import main
from jobs.benchmark.timing import peak_flops, utilisation
from screformer.config import ModelConfig
from screformer.cost import step_flops

SMALL = ["--rounds", "1", "--threads", "1", "--peak-tflops", "1"]


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_attention_prints_its_ratios(capsys):
    assert (
        main(["attention", "--lengths", "96", "128", "--bucket-size", "16", "--memory-length", "0", *SMALL])
        == 0
    )
    found = last_line(capsys)
    for name in ("lsh_vs_reformer_pytorch", "lsh_vs_full", "model_flops_utilisation", "seconds"):
        assert found[name].keys() == {"96", "128"}, name
    assert found["threads"] == 1 and found["versions"].keys() == {"torch", "reformer-pytorch"}


@pytest.mark.filterwarnings("ignore:distutils Version classes")
def test_step_prints_both_parts(capsys):
    sizes = [
        "--genes",
        "63",
        "--detected",
        "20",
        "--dim",
        "16",
        "--depth",
        "1",
        "--heads",
        "2",
        "--bucket-size",
        "16",
    ]
    assert main(["step", *sizes, "--base-lengths", "32", "--base-tokens", "64", *SMALL]) == 0
    found = last_line(capsys)
    assert (
        found["seconds"].keys()
        == {"scbert", "ours_all_genes", "ours_detected_genes"}
        == found["peak_mib"].keys()
    )
    assert {"step_vs_scbert", "step_detected_vs_scbert", "memory_vs_scbert", "lsh_vs_full"} <= found.keys()
    assert found["model_flops_utilisation"]["32"].keys() == {"lsh", "full"}
    assert all(0 < share < 1 for share in found["model_flops_utilisation"]["32"].values())


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("Tesla T4", None),
    ],
)
def test_peak_is_known_by_the_name_of_the_card_or_given_or_null(card, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16, None) == (tflops and tflops * 1e12)
    assert peak_flops(cuda, torch.float32, None) is None
    assert peak_flops(torch.device("cpu"), torch.float32, 0.5) == 5e11
    assert utilisation(2e12, 4.0, None) is None
    assert utilisation(2e12, 4.0, 1e12) == 0.5


def test_model_flops_are_those_of_the_formula():
    model = ModelConfig(dim=128, depth=4, attention="full", ff_mult=4)
    # By hand for 10 tokens: per token and block 12 products with 128 x 128 weights, and two of 128 with each
    # of 10 keys.
    assert step_flops(model, 10) == 3 * 4 * 10 * (2 * 12 * 128**2 + 2 * 2 * 128 * 10)
    # Shared queries and keys spare one; the keys are two buckets of 64 in each of four rounds.
    assert step_flops(replace(model, attention="lsh"), 10) == 3 * 4 * 10 * (
        2 * 11 * 128**2 + 2 * 2 * 128 * 512
    )
