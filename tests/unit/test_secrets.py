import os

import pytest

from jobs.tracking.client import store_address, tracking_uri
from screformer.config import AtlasConfig, ClusterConfig, ExperimentConfig, TrackingConfig
from screformer.secrets import without_secret

SECRET = "hunter2"


@pytest.mark.parametrize(
    "option",
    [
        "vfs.s3.aws_secret_access_key",
        "vfs.s3.aws_access_key_id",
        "vfs.s3.aws_session_token",
        "vfs.azure.storage_account_key",
        "vfs.azure.storage_account_sas_token",
        "rest.password",
        "sm.encryption_key",
    ],
)
def test_tiledb_options_with_a_secret_are_rejected(option: str) -> None:
    with pytest.raises(ValueError, match=rf"atlas.tiledb_config has the option {option}; .*environment") as e:
        AtlasConfig(tiledb_config={option: SECRET})
    assert SECRET not in str(e.value)
    with pytest.raises(ValueError, match="must not contain secrets"):
        ExperimentConfig().merge({"atlas.tiledb_config": {option: SECRET}})


def test_other_tiledb_options_are_settings() -> None:
    options = {
        "vfs.s3.region": "eu-west-1",
        "vfs.s3.endpoint_override": "minio:9000",
        "vfs.s3.scheme": "http",
    }
    assert AtlasConfig(tiledb_config=options).tiledb_config == options


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"postgresql://mlflow:{SECRET}@db:5432/mlflow", "postgresql://mlflow:***@db:5432/mlflow"),
        (f"http://me:{SECRET}@tracker:5000/path", "http://me:***@tracker:5000/path"),
        (f"s3://bucket/runs?region=eu&secret_key={SECRET}", "s3://bucket/runs?region=eu&secret_key=***"),
        (f"https://store/a?sig={SECRET}", "https://store/a?sig=***"),
        ("sqlite:////tmp/a:b@c/mlflow.db", "sqlite:////tmp/a:b@c/mlflow.db"),
        ("s3://bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1"),
        ("/folder/with:colon@home", "/folder/with:colon@home"),
    ],
)
def test_addresses_are_shown_without_secrets_and_rejected_with_them(address: str, shown: str) -> None:
    assert without_secret(address) == shown
    for make in (
        lambda: TrackingConfig(uri=address),
        lambda: ClusterConfig(storage_path=address),
        lambda: AtlasConfig(uri=address),
    ):
        if shown == address:
            make()
            continue
        with pytest.raises(ValueError, match="is an address with a password or key in it") as caught:
            make()
        assert SECRET not in str(caught.value)


def test_the_password_of_a_store_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")  # so both are restored
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    database = f"postgresql://mlflow:{SECRET}@db/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    uri = tracking_uri(TrackingConfig())
    assert uri == "postgresql://mlflow:***@db/mlflow" and store_address(uri) == database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    with pytest.raises(ValueError, match="is not saved; set MLFLOW_TRACKING_URI in the environment of every"):
        store_address(uri)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}%21@tracker:5000")
    assert tracking_uri(TrackingConfig()) == "http://tracker:5000"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (
        "me",
        f"{SECRET}!",
    )
