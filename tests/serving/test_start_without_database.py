"""An endpoint that starts while its database is away: real HTTP through a real ingress, real PostgreSQL, no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from serving.config import FeedbackConfig, LimitsConfig, ServeConfig
from serving.feedback.keys import create_key
from serving.feedback.store import Store
from serving.feedback.store.records import StoreAway
from serving.http.ingress import Ingress, ModelDeployments, _open_store
from serving.registry.versions import Registry
from serving.replica.engine_arguments import EngineSettings
from tests.databases import connection_to, new_database
from tests.serving.fleet import MODEL, Parrot, only_model
from tests.serving.tiny import whole


@contextmanager
def endpoint(registry: Registry, config: ServeConfig) -> Iterator[None]:
    settings = EngineSettings(config=config, registry=str(registry.folder), device="cpu")
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 1.0}
    engine = serve.deployment(Parrot, name="engine", **options).bind(settings)
    models = only_model(config, registry)
    deployments = {MODEL: ModelDeployments(engine=engine, scoring=engine, candidate=None)}
    ingress = serve.deployment(serve.ingress()(Ingress), name="ingress", **options)
    serve.run(
        ingress.bind(config, models, "test", deployments),
        name="endpoint",
        route_prefix="/",
    )
    try:
        until(lambda: httpx.get(f"{config.url}/healthz").status_code == 200)
        yield
    finally:
        serve.delete("endpoint")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_chats_are_answered_and_judgements_wait_until_the_database_is_back(
    light_ray: int, postgresql: str, tmp_path: Path
) -> None:
    database = new_database(postgresql)
    registry = Registry(tmp_path / "registry")
    registry.add(whole(tmp_path / "whole"))
    registry.promote(1)
    store = Store(database)
    admin, user = (create_key(store, name=role, role=role) for role in ("admin", "user"))  # type: ignore[arg-type]
    config = ServeConfig(
        checkpoint="model",
        name=MODEL,
        port=light_ray,
        limits=LimitsConfig(answers_in_progress=32),
        feedback=FeedbackConfig(record=True, database=database),
    )

    def ask(method: str, path: str, body: Any = None, key: str = admin) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        return httpx.request(method, config.url + path, json=body, headers=headers, timeout=60)

    question = {"model": MODEL, "prompt": "A colour:"}
    with endpoint(registry, config):
        assert ask("POST", "/v1/completions", question, user).status_code == 200
    name = database.rpartition("/")[2]
    with connection_to(f"{postgresql}/postgres") as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")  # type: ignore[call-overload]
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        with endpoint(registry, config):
            answer = ask("POST", "/v1/completions", question, user)
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "blue"
            assert ask("GET", "/v1/models", key=user[:-4] + "nope").status_code == 401
            judgement = {"kind": "thumb", "id": f"{answer.json()['id']}-0", "up": True}
            for refused in (ask("POST", "/v1/feedback", judgement), ask("GET", "/v1/feedback/export")):
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1, refused.text
                assert "cannot be opened" in refused.json()["error"]["message"]
            until(lambda: len(list((registry.folder / "unstored").glob("*.json"))) == 1)

            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")  # type: ignore[call-overload]
            store.revoke_key("user")
            until(lambda: ask("GET", "/v1/models", key=user).status_code == 401)
            until(lambda: ask("POST", "/v1/feedback", judgement).status_code == 200)
            assert "blue" in ask("GET", "/v1/feedback/export").text
    store.close()


def test_an_endpoint_that_has_never_run_says_that_it_needs_its_database() -> None:
    config = ServeConfig(checkpoint="model")
    with pytest.raises(StoreAway, match=r"127\.0\.0\.1:1/d cannot be opened.*only after it has run with it"):
        _open_store("postgresql://u@127.0.0.1:1/d", config, is_known=False)
