"""The size of a network, counted without building it."""

import subprocess
import sys
import time

import pytest

from screformer.config import ExperimentConfig
from screformer.cost import count_parameters
from screformer.model import ScReformer

NETWORKS = {
    "lsh": {"model.attention": "lsh"},
    "none": {"model.attention": "none", "model.gene_embedding": "random"},
    "no linear part": {"model.attention": "full", "model.linear_skip": False, "model.reversible": False},
    "additive": {
        "model.encoder": "additive",
        "model.linear_skip": False,
        "tokens.input_mode": "detected",
        "tokens.expression": "continuous",
    },
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_parameters_are_those_of_the_network(name: str, num_classes: int) -> None:
    config = ExperimentConfig().merge({"model.dim": 16, "model.heads": 2, **NETWORKS[name]})
    size = {"num_genes": 50, "num_classes": num_classes}
    network = ScReformer(config.model, config.tokens, **size, seed=0)
    expected = sum(param.numel() for param in network.parameters())
    assert count_parameters(config.model, config.tokens, **size) == expected
    assert all(param.device.type == "cpu" for param in network.parameters())


def test_a_network_of_any_size_is_counted_at_once() -> None:
    settings = {"model.dim": 2**15, "model.depth": 200, "model.attention": "full"}
    config = ExperimentConfig().merge(settings)
    start_s = time.process_time()
    count = count_parameters(config.model, config.tokens, num_genes=60_000, num_classes=1000)
    assert count > 2e12 and time.process_time() - start_s < 2


def test_counting_loads_no_more_of_pytorch() -> None:
    program = (
        "import sys; from screformer.config import ExperimentConfig as C;"
        " from screformer.cost import count_parameters as count; before = set(sys.modules);"
        " c = C().merge({'model.attention': 'full'});"
        " count(c.model, c.tokens, num_genes=9, num_classes=2); print('sympy' in set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
