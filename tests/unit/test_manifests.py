"""The files in cluster/ agree with each other and with the code: images, names, ports, versions, and commands
that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.finetune import main as finetune
from jobs.training.launch import check_layout
from screformer import __version__

REPO_ROOT = Path(__file__).resolve().parents[2]
CLUSTER = REPO_ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def pods(cluster_spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {
        "head": cluster_spec["headGroupSpec"],
        **{group["groupName"]: group for group in cluster_spec["workerGroupSpecs"]},
    }
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


RAY_CLUSTER = load("raycluster.yaml")[0]
RAY_JOB = load("rayjob.yaml")[0]
MLFLOW = {document["kind"]: document for document in load("mlflow.yaml")}
COMPOSE = load("compose.yaml")[0]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_kinds() -> None:
    assert (RAY_CLUSTER["apiVersion"], RAY_CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert {kind: document["apiVersion"] for kind, document in MLFLOW.items()} == {
        "PersistentVolumeClaim": "v1",
        "Deployment": "apps/v1",
        "Service": "v1",
    }


def test_the_job_creates_the_same_cluster() -> None:
    assert RAY_JOB["spec"]["rayClusterSpec"] == RAY_CLUSTER["spec"]


def test_one_image_everywhere() -> None:
    containers = [
        *pods(RAY_CLUSTER["spec"]).values(),
        MLFLOW["Deployment"]["spec"]["template"]["spec"]["containers"][0],
    ]
    images = {container["image"] for container in containers} | {
        service["image"] for service in COMPOSE["services"].values()
    }
    assert images == {f"screformer:{__version__}"}
    assert f"-t screformer:{__version__}" in README and f"-t screformer:{__version__}" in DOCKERFILE


def test_ray_is_the_tested_version() -> None:
    assert f"ray=={RAY_CLUSTER['spec']['rayVersion']}\n" in (REPO_ROOT / "constraints.txt").read_text()


def test_pods_are_limited_and_have_no_rights() -> None:
    templates = [
        RAY_CLUSTER["spec"]["headGroupSpec"],
        *RAY_CLUSTER["spec"]["workerGroupSpecs"],
        MLFLOW["Deployment"]["spec"],
    ]
    for spec in (template["template"]["spec"] for template in templates):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert set(container["resources"]) == {"requests", "limits"}
            assert (
                container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            ), "otherwise the kernel kills it first"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["ray"]


def test_only_pods_that_need_to_reach_ray_and_mlflow() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in load("network.yaml")}
    ray_pods = {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    assert policies["screformer-ray"]["podSelector"] == ray_pods
    mlflow = policies["screformer-mlflow"]
    assert mlflow["podSelector"]["matchLabels"] == MLFLOW["Service"]["spec"]["selector"]
    port = MLFLOW["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert mlflow["ingress"] == [{"from": [{"podSelector": ray_pods}], "ports": [{"port": port}]}]
    assert all(spec["policyTypes"] == ["Ingress"] for spec in policies.values())


def test_each_container_gets_its_own_secrets() -> None:
    secret = {"RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    services = COMPOSE["services"]
    assert not secret & services["mlflow"].get("environment", {}).keys()
    assert all(secret <= services[name]["environment"].keys() for name in ("head", "worker"))
    mlflow = MLFLOW["Deployment"]["spec"]["template"]["spec"]
    assert not mlflow["automountServiceAccountToken"] and "envFrom" not in mlflow["containers"][0]


def test_the_image_starts_ray_only_with_a_token() -> None:
    assert re.search(r"^ENV .*\bRAY_AUTH_MODE=token\b", DOCKERFILE, re.MULTILINE)


def test_jobs_log_to_the_mlflow_server() -> None:
    service, container = MLFLOW["Service"], MLFLOW["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    url = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    for pod in pods(RAY_CLUSTER["spec"]).values():
        assert {"name": "MLFLOW_TRACKING_URI", "value": url} in pod["env"]
    assert service["spec"]["selector"] == MLFLOW["Deployment"]["spec"]["template"]["metadata"]["labels"]
    port = f"--port={container['ports'][0]['containerPort']}"
    assert port in container["args"] and port in COMPOSE["services"]["mlflow"]["command"]
    allowed = next(argument for argument in container["args"] if argument.startswith("--allowed-hosts="))
    assert url.removeprefix("http://") in allowed.partition("=")[2].split(","), (
        "MLflow responds with 403 to unknown Host headers"
    )


def test_the_job_is_a_command_that_fits_its_cluster() -> None:
    python, flag, module, *arguments = shlex.split(RAY_JOB["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "jobs.finetune")
    args = finetune.parse(arguments)
    config = args.settings
    assert config.atlas.uri.startswith("s3://") and args.run_dir.startswith("s3://"), "pods share no disk"
    assert RAY_JOB["spec"]["backoffLimit"] > 0, "with --run-dir, the same command resumes the run"
    group = RAY_CLUSTER["spec"]["workerGroupSpecs"][0]
    cpus = float(pods(RAY_CLUSTER["spec"])["cpu"]["resources"]["limits"]["cpu"])
    check_layout(config, [{"Alive": True, "Resources": {"CPU": cpus}}] * group["minReplicas"])


def test_before_a_commit_runs_what_make_lint_runs() -> None:
    makefile = (REPO_ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    lint = [line.strip().replace("$(RUN)", ".venv/bin/python") for line in recipe[1].splitlines()]
    config = yaml.safe_load((REPO_ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["entry"] for hook in config["repos"][0]["hooks"]] == lint


@pytest.mark.parametrize("path", re.findall(r"cluster/\w+(?:\.yaml)?", README))
def test_files_of_the_readme_exist(path: str) -> None:
    assert (REPO_ROOT / path).exists()


def test_the_image_gets_what_it_copies() -> None:
    kept = {
        line[1:] for line in (REPO_ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == kept and all((REPO_ROOT / path).exists() for path in copied)


def test_the_tests_of_the_faults_exist() -> None:
    table = README.partition("## Faults and their tests")[2]
    rows = re.findall(r"^\| (\d+)\. .*$", table, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 17))
    there = {path.name for path in (REPO_ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"test_\w+\.py", table))
    assert named and named <= there, named - there
