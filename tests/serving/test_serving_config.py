"""What `raylign serve` is told, before Ray or vLLM are even imported."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import CheckpointError, ConfigError, ServingError
from alignment.models.folders import BUNDLED
from serving.app import build
from serving.config import ServeConfig, load_serve_config
from serving.launch import RunningEndpoint, refuse_busy_port
from serving.registry.served_model import ServedModel, check_here, publish, rewards_length
from serving.registry.versions import Registry
from serving.schema import RequestError, parse_json
from serving.start import exception_text
from tests.serving.tiny import BASE, MODULES, adapter, of_run, whole

EXAMPLES = Path(__file__).parents[2] / "configs" / "serve"


def published(checkpoint: Path, tmp_path: Path, **settings: Any) -> ServedModel:
    """What an endpoint of a checkpoint serves."""
    config = ServeConfig(checkpoint=str(checkpoint), folder=str(tmp_path / "serving"), **settings)
    return publish(config).served_model


def test_importing_serving_imports_neither_ray_nor_vllm() -> None:
    code = (
        "import sys, serving, serving.launch; sys.exit(sum(name in sys.modules for name in ('ray', 'vllm', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("example", ["gpu.yaml", "local.yaml"])
def test_the_example_files_are_valid(example: str) -> None:
    assert load_serve_config(BUNDLED, [], EXAMPLES / example).checkpoint == BUNDLED


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


@pytest.mark.parametrize("database", ["postgresql+psycopg://u:hunter2@h/d", "postgresql://h/d?password=hunter2"])
def test_a_database_with_its_password_is_refused_without_telling_it(database: str) -> None:
    """It would stand in the deployment's arguments, which Ray's dashboard and Serve's status show."""
    with pytest.raises(ConfigError, match=r"feedback.database: must hold no password") as raised:
        load_serve_config(BUNDLED, [f"feedback.database={database}"], None)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["port=70000", "dtype=fp8", "max_replicas=0", "min_replicas=3", "name='a:b'"])
def test_a_wrong_value_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        load_serve_config(BUNDLED, [wrong], None)


def test_a_checkpoint_named_like_yaml_stays_a_name() -> None:
    assert load_serve_config("12: [x", [], None).checkpoint == "12: [x"


def test_a_run_is_served_from_its_newest_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    run = tmp_path / "polite"
    of_run(run, 1, seed=1)
    newest = of_run(run, 2, seed=2)
    served = published(run, tmp_path)
    assert served.adapter is not None
    assert served.adapter.name == served.name == "polite"
    kept = Path(served.adapter.folder) / "adapter_model.safetensors"
    assert kept.read_bytes() == (newest / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_of_a_run_is_named_after_both(tmp_path: Path) -> None:
    checkpoint = of_run(tmp_path / "polite", 1)
    assert published(checkpoint, tmp_path).names[0] == "polite-step-00000001"


def test_a_damaged_checkpoint_is_not_served(tmp_path: Path) -> None:
    checkpoint = of_run(tmp_path / "polite", 1)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        published(checkpoint, tmp_path)


def test_an_adapter_brings_its_base_and_a_hub_id_keeps_its_name(tmp_path: Path) -> None:
    served = published(adapter(tmp_path / "my-dpo", rank=12), tmp_path)
    assert served.names == ["my-dpo", BASE]
    assert served.adapter is not None and served.lora_capacity is not None
    assert (served.adapter.rank, served.lora_capacity.rank, served.lora_capacity.target_modules) == (12, 16, MODULES)


def test_a_given_name_replaces_the_folders(tmp_path: Path) -> None:
    assert published(adapter(tmp_path / "a"), tmp_path, name="assistant").names == ["assistant", BASE]


def test_an_adapter_that_would_hide_its_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="name="):
        published(adapter(tmp_path / "a"), tmp_path, name=BASE)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_vllm_cannot_serve_are_refused_at_once(tmp_path: Path, kind: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="merge it"):
        published(adapter(tmp_path / "a", **kind), tmp_path)


def test_a_start_goes_on_with_what_was_promoted_and_registers_what_is_new(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a", seed=1), adapter(tmp_path / "b", seed=2)
    config = ServeConfig(checkpoint=str(first), folder=str(tmp_path / "serving"), name="model")
    registry = publish(config).registry
    registry.promote(registry.add(second).number)
    again = publish(config)
    assert registry.state().current == 2
    assert again.note is not None and again.note.startswith(f"{first} is version 1. Version 2 (b) answers, as before.")
    third = config.model_copy(update={"checkpoint": str(adapter(tmp_path / "c", seed=3)), "port": 8123})
    started = publish(third)
    assert registry.state().current == 2
    assert started.served_model.adapter is not None and started.served_model.adapter.folder.endswith("/00002")
    assert "`raylign promote 3 --url http://127.0.0.1:8123` changes to version 3" in str(started.note)
    assert publish(third.model_copy(update={"promote": True})).note is None
    assert registry.state().current == 3


def test_a_start_after_training_went_on_serves_what_it_served(tmp_path: Path) -> None:
    run = tmp_path / "polite"
    of_run(run, 100, seed=1)
    config = ServeConfig(checkpoint=str(run), folder=str(tmp_path / "serving"))
    registry = publish(config).registry
    of_run(run, 200, seed=2)
    assert publish(config, is_live=True).note is not None
    assert (registry.state().current, registry.version(2).name) == (1, "polite-step-00000200")
    registry.promote(2)
    registry.rollback()
    of_run(run, 300, seed=3)
    publish(config)
    assert registry.state().current == 1


def test_a_checkpoint_that_cannot_be_registered_ends_no_service_that_has_a_version(tmp_path: Path) -> None:
    config = ServeConfig(checkpoint=str(whole(tmp_path / "a")), folder=str(tmp_path / "serving"), name="prod")
    publish(config)
    other = config.model_copy(update={"checkpoint": str(whole(tmp_path / "other", hidden_size=32))})
    started = publish(other)
    assert started.registry.state().current == 1 and len(started.registry.versions()) == 1
    assert "was not registered" in str(started.note) and "another model" in str(started.note)
    gone = config.model_copy(update={"checkpoint": str(tmp_path / "gone")})
    assert "was not registered" in str(publish(gone).note)
    promoted = other.model_copy(update={"promote": True})
    with pytest.raises(ServingError, match="another model"):
        publish(promoted, is_live=True)
    assert publish(promoted).registry.state().current == 2, "nothing that runs would have to change to it"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_an_endpoint_without_keys_is_for_this_machine_alone(host: str) -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        load_serve_config(BUNDLED, ["no_keys=true", f"host='{host}'"], None)
    assert load_serve_config(BUNDLED, ["no_keys=true"], None).no_keys


def test_a_busy_port_is_refused_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} of 127.0.0.1"):
            refuse_busy_port("127.0.0.1", port)
    refuse_busy_port("127.0.0.1", port)


def test_the_gist_of_a_traceback_is_its_exception() -> None:
    trace = 'Failed. Error:\n  File "x.py", line 1\nValueError: too long\n  by 3 tokens [type=value_error]\n\n'
    assert exception_text(trace) == "ValueError: too long by 3 tokens"
    assert exception_text("Waiting for a CPU.\nSee the log.") == "Waiting for a CPU."
    assert exception_text(f"{trace}\n  x = 1\nalignment.errors.ServingError: vLLM does not start: no room\n") == (
        "vLLM does not start: no room"
    )
    assert exception_text(f"{trace}\nserving.store.records.StoreAway: The database is away\n") == "The database is away"


def test_ready_says_what_it_means_where_nothing_is_loaded_yet() -> None:
    text = str(RunningEndpoint(url="http://x", names=["m"], version=1, needs_keys=True, is_asleep=True))
    assert "No replica runs yet (min_replicas=0): the first request starts one" in text and "\n" not in text
    assert "No replica" not in str(RunningEndpoint(url="http://x", names=["m"], version=1, needs_keys=True))


def test_more_tokens_to_rate_than_the_model_has_positions_are_refused_at_the_start(tmp_path: Path) -> None:
    base = whole(tmp_path / "base", max_position_embeddings=512)
    tuned = adapter(tmp_path / "tuned", base_model_name_or_path=str(base))
    for number, (checkpoint, more) in enumerate(((tuned, {}), (base, {"reference": str(base)}))):
        folder = tmp_path / str(number)
        with pytest.raises(ServingError, match=r"rewards\.max_length \(600\) is more than the 512 positions of"):
            published(checkpoint, folder, rewards={"max_length": 600, **more})
        published(checkpoint, folder, rewards={"max_length": 512, **more})
        published(checkpoint, folder, rewards={"max_length": 600, "model": "another/one", **more})
    assert rewards_length(ServeConfig(checkpoint="x"), str(base)) == 512
    assert rewards_length(ServeConfig(checkpoint="x"), "on/a-hub") == 2048


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
    with pytest.raises(RequestError) as refused:
        parse_json(body)
    assert refused.value.reply.status == 400
    assert json.loads(refused.value.reply.body)["error"]["type"] == "invalid_request_error"


def test_a_sound_body_is_read_as_it_is() -> None:
    body = {"text": "naïve 😀", "list": [1, -2.5, None, True, {"deep": [[]]}]}
    assert parse_json(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("template", "settings", "can_chat"),
    [("{{ messages }}", {}, True), (None, {}, False), (None, {"chat_template": "chatml"}, True)],
)
def test_a_model_without_a_chat_template_says_so_and_shows_what_works(
    tmp_path: Path, template: str | None, settings: dict[str, str], can_chat: bool
) -> None:
    model = whole(tmp_path / "base")
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    served = published(model, tmp_path, **settings)
    assert served.can_chat == can_chat
    text = str(RunningEndpoint(url="http://x", names=["base"], version=1, needs_keys=False, can_chat=served.can_chat))
    assert ("/v1/chat/completions" in text) == can_chat
    assert ("no chat template" in text) == (not can_chat)


def test_an_endpoint_whose_address_is_another_programs_choice_needs_keys() -> None:
    with pytest.raises(ConfigError, match=r"no_keys: is for `raylign serve` on 127\.0\.0\.1"):
        build({"checkpoint": BUNDLED, "no_keys": True})


def test_a_machine_that_does_not_see_the_registry_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="has no version that answers: several machines must share it"):
        check_here(Registry(tmp_path / "mount-that-is-not-there"))
