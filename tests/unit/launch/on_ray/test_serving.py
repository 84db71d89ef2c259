"""What `llmtrain serve --replicas` is asked for, before any Ray."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.on_ray import serving
from launch.on_ray.serving import ReplicaOptions
from llmtrain.cli.app import app
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(("text", "least", "most"), [("2", 2, 2), ("1-4", 1, 4), ("1000", 1000, 1000)])
def test_numbers_of_replicas(text: str, least: int, most: int) -> None:
    found = ReplicaOptions.of(text)
    assert (found.least, found.most) == (least, most)
    assert found.launch("cpu").num_workers == most, "a Ray of its own has room for all"


@pytest.mark.parametrize("text", ["0", "4-2", "0-2", "two", "", "-1", "1-", "1-2-3", "1001", "9" * 5000, "\u0662"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--replicas .{0,40}: must be a number from 1 to 1000") as caught:
        ReplicaOptions.of(text)
    assert len(str(caught.value)) < 200


def test_addresses_that_are_no_heads() -> None:
    for address in ("http://a:1", "a", "ray://a:1"):
        with pytest.raises(ConfigError, match="must be host:port"):
            replace(ReplicaOptions.of("2"), address=address).launch("auto")
    for address in (None, "auto", "local", "10.0.0.1:6379"):
        assert replace(ReplicaOptions.of("2"), address=address).launch("auto").ray_address == address


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("parallel.tensor=2", "--replicas", "2"), "parallel.tensor=2: does not go with --replicas"),
        (("--threads", "2"), "--threads: goes with --replicas"),
        (("--ray-address", "auto"), "--ray-address: goes with --replicas"),
        (("--allow-open-cluster",), "--allow-open-cluster: goes with --replicas"),
        (("--replicas", "2-1"), "--replicas 2-1: must be a number"),
        (("--replicas", "2"), "pip install 'llmtrain[replicas]'"),
    ],
)
def test_what_does_not_go_is_said_at_once(
    options: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PACKAGES", ("a_package_that_is_not_there",))
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0", *options])
    assert done.exit_code != 0 and told in " ".join(done.stderr.split()) and done.stdout == ""
