"""What `raylign serve` is told, before Ray or vLLM are even imported."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import CheckpointError, ConfigError, ServingError
from alignment.models.folders import BUNDLED
from serving.config import ServeConfig, load_serve_config
from serving.launch import _gist, refuse_busy_port
from serving.schema import Refused, sound_json
from serving.served import resolve

EXAMPLES = Path(__file__).parents[2] / "configs" / "serve"


def adapter_folder(folder: Path, **settings: Any) -> str:
    folder.mkdir(parents=True)
    known = {"r": 12, "target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return str(folder)


def test_importing_serving_imports_neither_ray_nor_vllm() -> None:
    code = (
        "import sys, serving, serving.launch; sys.exit(sum(name in sys.modules for name in ('ray', 'vllm', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_files_are_valid(example: Path) -> None:
    assert load_serve_config(BUNDLED, [], example).checkpoint == BUNDLED


def test_an_override_goes_before_the_file_and_the_file_before_the_default() -> None:
    config = load_serve_config(BUNDLED, ["port=9000"], EXAMPLES / "local.yaml")
    assert (config.port, config.max_num_seqs, config.max_replicas) == (9000, 16, 1)


def test_a_wrong_key_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_replicas'"):
        load_serve_config(BUNDLED, ["max_replica=2"], None)


def test_wrong_arguments_of_build_are_explained() -> None:
    from serving import build

    with pytest.raises(ConfigError) as caught:
        build({"checkpoint": BUNDLED, "max_replica": 2, "port": 70000})
    assert "max_replica: unknown key; did you mean 'max_replicas'?" in str(caught.value).splitlines()
    assert "port: " in str(caught.value)


@pytest.mark.parametrize("wrong", ["port=70000", "dtype=fp8", "max_replicas=0", "min_replicas=3", "name='a:b'"])
def test_a_wrong_value_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        load_serve_config(BUNDLED, [wrong], None)


def test_a_checkpoint_named_like_yaml_stays_a_name() -> None:
    assert load_serve_config("12: [x", [], None).checkpoint == "12: [x"


def committed(folder: Path, **settings: Any) -> Path:
    """A checkpoint as training writes it: an adapter, a manifest and a commit mark."""
    adapter_folder(folder, **settings)
    content = (folder / "adapter_config.json").read_bytes()
    known = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = json.dumps({"adapter_config.json": known})
    (folder / "manifest.json").write_text(manifest)
    (folder / "COMMITTED").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    return folder


def test_a_run_is_served_from_its_newest_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    run = tmp_path / "polite"
    committed(run / "checkpoints" / "step-00000001")
    newest = committed(run / "checkpoints" / "step-00000002")
    served = resolve(ServeConfig(checkpoint=str(run)))
    assert served.adapter is not None
    assert (served.adapter.name, served.adapter.folder) == ("polite", str(newest.resolve()))


def test_a_checkpoint_of_a_run_is_named_after_both(tmp_path: Path) -> None:
    checkpoint = committed(tmp_path / "polite" / "checkpoints" / "step-00000001")
    assert resolve(ServeConfig(checkpoint=str(checkpoint))).names[0] == "polite-step-00000001"


def test_a_damaged_checkpoint_is_not_served(tmp_path: Path) -> None:
    checkpoint = committed(tmp_path / "polite" / "checkpoints" / "step-00000001")
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        resolve(ServeConfig(checkpoint=str(checkpoint)))


def test_an_adapter_brings_its_base_and_a_hub_id_keeps_its_name(tmp_path: Path) -> None:
    served = resolve(ServeConfig(checkpoint=adapter_folder(tmp_path / "my-dpo")))
    assert served.names == ["my-dpo", "org/base"]
    assert served.adapter is not None
    assert (served.adapter.rank, served.adapter.target_modules) == (12, ("q_proj", "v_proj"))


def test_the_largest_rank_of_any_layer_counts(tmp_path: Path) -> None:
    served = resolve(ServeConfig(checkpoint=adapter_folder(tmp_path / "a", rank_pattern={"q_proj": 40})))
    assert served.adapter is not None and served.adapter.rank == 40


def test_a_given_name_replaces_the_folders(tmp_path: Path) -> None:
    served = resolve(ServeConfig(checkpoint=adapter_folder(tmp_path / "a"), name="assistant"))
    assert served.names == ["assistant", "org/base"]


def test_an_adapter_that_would_hide_its_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="name="):
        resolve(ServeConfig(checkpoint=adapter_folder(tmp_path / "a"), name="org/base"))


@pytest.mark.parametrize("kind", [{"r": 1000}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_vllm_cannot_serve_are_refused_at_once(tmp_path: Path, kind: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="merge it"):
        resolve(ServeConfig(checkpoint=adapter_folder(tmp_path / "a", **kind)))


def test_a_busy_port_is_refused_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} of 127.0.0.1"):
            refuse_busy_port("127.0.0.1", port)
    refuse_busy_port("127.0.0.1", port)


def test_the_gist_of_a_traceback_is_its_exception() -> None:
    trace = 'Failed. Error:\n  File "x.py", line 1\nValueError: too long\n  by 3 tokens [type=value_error]\n\n'
    assert _gist(trace) == "ValueError: too long by 3 tokens"
    assert _gist("Waiting for a CPU.\nSee the log.") == "Waiting for a CPU."


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b"\xff{}",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": [-Infinity]}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": "\\u0000"}',
        b'{"a": 99999999999999999999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_an_unsound_body_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as refused:
        sound_json(body)
    assert refused.value.reply.status == 400
    assert json.loads(refused.value.reply.body)["error"]["type"] == "invalid_request_error"


def test_a_sound_body_is_read_as_it_is() -> None:
    body = {"text": "naïve 😀", "list": [1, -2.5, None, True, {"deep": [[]]}]}
    assert sound_json(json.dumps(body).encode()) == body
