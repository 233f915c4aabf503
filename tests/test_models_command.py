"""`segcli models` and the first use of a published model, through the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import released
import torch
from loopback import Server, give, serving
from released import THIN
from small_model import save_picture, small_model

from segcli import downloads
from segcli.cli import main
from segcli.models import zoo
from segcli.models.networks import NETWORKS
from segcli.models.published import PUBLISHED
from segcli.models.vgg import VGG16FCN
from segcli.models.zoo import cached_model


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and one bundled model."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "fcn8s-small.safetensors").write_bytes(small_model().read_bytes())
    monkeypatch.setattr(zoo, "IN_WHEEL", weights)
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SEGCLI_OFFLINE", raising=False)
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Server]]:
    """A published model whose file is a thin net on a loopback server."""
    torch.save(released.vgg_weights(32, 21, 0), tmp_path / "published.pth")
    content = (tmp_path / "published.pth").read_bytes()
    monkeypatch.setitem(NETWORKS, "fcn32s", partial(VGG16FCN, stride=32, widths=THIN))
    with serving() as server:
        server.script = [give(content)]
        record = dataclasses.replace(
            PUBLISHED["fcn32s-vgg16-voc-pth"],
            addresses=(server.address,),
            checksum="md5:" + hashlib.md5(content).hexdigest(),
        )
        monkeypatch.setitem(PUBLISHED, record.name, record)
        yield record.name, server


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    output = capfd.readouterr()
    code = exit_.value.code
    return (code if isinstance(code, int) else 0), output.out, output.err


def document(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run(capfd, *arguments, "--json")
    assert code == 0
    content: dict[str, Any] = json.loads(out)
    return content


def test_list_fits_80_columns(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "models", "list")
    assert (code, err) == (0, "")  # the list is the answer: it can be piped
    assert max(map(len, out.splitlines())) <= 80
    (line,) = [line for line in out.splitlines() if "fcn8s-atonce-vgg16-voc-pth" in line]
    assert line.split() == ["fcn8s-atonce-vgg16-voc-pth", "21", "513", "MiB", "65.4", "(2)", "to", "download"]
    (line,) = [line for line in out.splitlines() if "siftflow" in line and "fcn16s" in line]
    assert line.split()[1:4] == ["33", "+", "3"]
    assert "(2) published, on VOC seg11valid, 736 images" in out
    (line,) = [line for line in out.splitlines() if "fcn8s-small" in line]
    assert line.split()[-1] == "bundled"


def test_list_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    models = document(capfd, "models", "list")["models"]
    assert len(models) == len(PUBLISHED) + 1
    by_name = {model["name"]: model for model in models}
    assert by_name["fcn-resnet50-voc"]["mean_iou"] == 60.5
    assert by_name["fcn-resnet50-voc"]["measured"] is False
    assert by_name["fcn8s-small"]["measured"] is True


@pytest.mark.parametrize("name", ["fcn8s-small", *PUBLISHED])
def test_info_of_every_model(capfd: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capfd, "models", "info", name)
    assert code == 0
    rows = out.splitlines()
    assert rows[0] == name
    for what in ("network", "classes", "licence", "images"):
        assert any(row.startswith(f"  {what} ") for row in rows)
    too_long = [row for row in rows if len(row) > 80 and " " in row.strip()[15:]]
    assert all("http" in row for row in too_long)
    if name in PUBLISHED:
        assert document(capfd, "models", "info", name)["published"]["network"] == PUBLISHED[name].network


def test_info_of_a_file_and_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    info = document(capfd, "models", "info", str(small_model()))
    assert info["network"] == "fcn8s-mobilenet_v3_large"
    assert info["class_set"]["names"][15] == "person"
    code, _, err = run(capfd, "models", "info", "fcn8s-smal")
    assert code == 2
    assert "did you mean 'fcn8s-small'?" in err
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    code, _, err = run(capfd, "models", "info", str(tmp_path / "page.safetensors"))
    assert code == 2
    assert "web page" in err


def test_download_then_info_then_verify(
    capfd: pytest.CaptureFixture[str], published: tuple[str, Server]
) -> None:
    name, server = published
    code, _, err = run(capfd, "models", "download", name)
    assert code == 0
    assert "about 519 MiB, from 127.0.0.1" in err
    assert str(cached_model(PUBLISHED[name])) in err
    found = document(capfd, "models", "download", name)["models"]
    assert found == [{"name": name, "path": str(cached_model(PUBLISHED[name]))}]
    assert len(server.requests) == 1
    assert "cached" in run(capfd, "models", "list")[1]
    _, out, _ = run(capfd, "models", "info", name)
    assert "mean IU 63.6 % on VOC seg11valid, 736 images; published" in out
    results = document(capfd, "models", "verify")["models"]
    assert [(result["name"], result["good"]) for result in results] == [("fcn8s-small", True), (name, True)]
    path = cached_model(PUBLISHED[name])
    path.write_bytes(path.read_bytes()[:-5])
    code, out, err = run(capfd, "models", "verify", name, "fcn8s-small", "--json")
    assert code == 2
    assert [result["good"] for result in json.loads(out)["models"]] == [False, True]
    assert f"damaged  {name}" in err


def test_verify_what_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capfd, "models", "verify", "fcn-resnet50-voc")
    assert code == 2
    assert "is not on this machine" in err


def test_predict_downloads_on_first_use(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], published: tuple[str, Server]
) -> None:
    name, server = published
    save_picture(tmp_path / "photos" / "a.png")
    arguments = ["predict", str(tmp_path / "photos"), "--out", str(tmp_path / "masks"), "--model", name]
    arguments += ["--device", "cpu"]
    code, _, err = run(capfd, *arguments, "--offline")
    assert code == 3
    assert server.address in err
    assert err.strip().count("\n") == 1
    assert server.requests == []
    code, _, err = run(capfd, *arguments)
    assert code == 0
    assert "downloading" in err
    assert (tmp_path / "masks" / "a.png").is_file()
    assert len(server.requests) == 1


def test_a_download_that_fails_exits_with_3(
    capfd: pytest.CaptureFixture[str], published: tuple[str, Server]
) -> None:
    name, server = published
    server.script = [lambda handler: handler.start(404, Content_Length="0")]
    code, _, err = run(capfd, "models", "download", name)
    assert code == 3
    assert "404" in err
    assert f"Get it by hand from {server.address} and save it as " in err
    assert not cached_model(PUBLISHED[name]).exists()
