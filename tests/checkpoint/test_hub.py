"""Uploads to and downloads from a hub on loopback, by the hub's real client; and what model cards say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import ahn
from ahn.errors import CheckpointError, ModelError
from tests.checkpoint.hub_server import COMMIT, Hub, running
from tests.tiny import tiny, with_memory

ROOT = Path(__file__).parents[2]
SCENARIO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import ahn
from ahn.checkpoint.content import memory_tensors
from tests.tiny import give_score_weights, tiny, with_memory

model, place = with_memory(), sys.argv[2]
tiny().save_pretrained(place + "/base")
model.config._name_or_path = place + "/base"
give_score_weights(model)
found = {"commit": ahn.push_to_hub(model, "me/memory", token="secret", license="mit", datasets=["me/books"])}


def same(other):
    return all(torch.equal(tensor, memory_tensors(other)[key]) for key, tensor in memory_tensors(model).items())


def error(action):
    try:
        action()
    except ahn.AHNError as problem:
        return str(problem)


plain = tiny()
ahn.load(plain, "me/memory", token="secret", cache_dir=place + "/cache")
ahn.load_anchors(plain, "me/memory", token="secret", cache_dir=place + "/cache")
found["load"] = same(plain)
found["alone"] = same(ahn.from_pretrained("me/memory", token="secret", cache_dir=place + "/cache"))
offline = ahn.from_pretrained("me/memory", token="secret", cache_dir=place + "/cache", local_files_only=True)
found["offline"] = same(offline)
found["not there"] = error(lambda: ahn.load(tiny(), "me/nothing", token="secret"))
found["wrong token"] = error(lambda: ahn.push_to_hub(model, "me/memory", token="wrong"))
ahn.push_to_hub(model, "me/memory", token="secret", card="# By hand")
ahn.push_to_hub(model, "me/memory", token="secret")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Hub]]:
    """What a process found that pushed a memory and loaded it again, and the hub afterwards."""
    place = tmp_path_factory.mktemp("hub")
    with running("secret") as hub:
        done = subprocess.run(
            [sys.executable, "-c", SCENARIO, str(ROOT), str(place)],
            capture_output=True,
            text=True,
            timeout=200,
            env={
                **os.environ,
                "HF_ENDPOINT": hub.address,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(place / "home"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads(done.stdout.splitlines()[-1]), hub


def test_what_was_pushed_is_loaded(shared: tuple[dict[str, Any], Hub]) -> None:
    found, hub = shared
    assert found["commit"].endswith(f"/me/memory/commit/{COMMIT}")
    assert (found["load"], found["alone"], found["offline"]) == (True, True, True)
    names = {"README.md", "ahn.safetensors", "ahn_config.json", "anchors.safetensors", "anchors_config.json"}
    assert set(hub.files["me/memory"]) == names


def test_a_hub_that_refuses_is_one_line(shared: tuple[dict[str, Any], Hub]) -> None:
    found, _ = shared
    assert "cannot be fetched from the hub" in found["not there"]
    assert "the hub did not take it" in found["wrong token"]
    assert "hf auth login" in found["wrong token"]
    assert "\n" not in found["wrong token"] + found["not there"]


def test_a_card_by_hand_stays(shared: tuple[dict[str, Any], Hub]) -> None:
    _, hub = shared
    assert hub.files["me/memory"]["README.md"] == b"# By hand"


def test_a_name_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="Give it as owner/name"):
        ahn.push_to_hub(with_memory(), "memory")
    with pytest.raises(ModelError, match="no memory is attached"):
        ahn.push_to_hub(tiny(), "me/memory")


class TestCards:
    def test_metadata(self, tmp_path: Path) -> None:
        model = with_memory()
        model.config._name_or_path = "owner/base"
        ahn.save(model, tmp_path)
        text = (tmp_path / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        values = yaml.safe_load(front)
        assert (values["base_model"], values["library_name"]) == ("owner/base", "ahn")
        assert values["pipeline_tag"] == "text-generation"
        assert f'ahn.from_pretrained("owner/base", adapter="{tmp_path}")' in body
        assert "| window, sinks | 16, 5" in body

    def test_a_path_is_no_base_model(self, tmp_path: Path) -> None:
        model = with_memory()
        model.config._name_or_path = "/home/me/base"
        ahn.save(model, tmp_path)
        assert "base_model" not in (tmp_path / "README.md").read_text().split("---\n")[1]

    def test_a_readme_stays(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("mine")
        ahn.save(with_memory(), tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"
