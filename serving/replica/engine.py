"""One replica: a vLLM engine behind Ray Serve LLM's server, which knows Ray, placement and OpenAI's protocol.

Only the replica imports vLLM, inside functions. The import costs 10 s of CPU time per process, so neither the launcher
nor the ingress may import vLLM.

Names of Ray that are not public, each used in one place: `_oai_models`, vLLM's registry of models, and
`_oai_serving_chat`, vLLM's answers to chats (`_tokenization`), and `_engine_client`, vLLM's AsyncLLM. Others stand in
`serving.replica.engine_arguments` and `serving.replica.engine_replies`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from ray import serve

from alignment.errors import AlignmentError, ServingError
from alignment.start_failure import StartLog
from alignment.vllm.arguments import load_vllm
from serving.garbage import freeze_heap
from serving.registry.served_model import served_version
from serving.registry.state import State
from serving.registry.versions import Registry
from serving.replica.batching import batch_items
from serving.replica.engine_arguments import EngineSettings, engine_class, llm_config, set_environment, setting_names
from serving.replica.engine_replies import MAX_MESSAGE, ModelNames, engine_error, parse_request, to_reply
from serving.replica.grammar import forms_of
from serving.replica.probe import probe
from serving.replica.prompts import read_shielded_prompts, shield_chat
from serving.replica.trial import Trials
from serving.replica.versions import (
    TURN_LOCK,
    Loader,
    LoadFailure,
    MoveLimits,
    PartialLoadError,
    ReplicaUnavailable,
    Versions,
    candidate_version,
    fleet_version,
)
from serving.replica.weight_loaders import AdapterLoader, WholeWeightsLoader
from serving.schema import (
    TOKEN_ROUTES,
    Redirect,
    Reply,
    RequestError,
    Route,
    error_reply,
    event,
)

if TYPE_CHECKING:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("ray.serve")

FORM_FIELDS = {"response_format", "structured_outputs"}
"""Fields of a request that ask for an answer in a certain form."""
KEEP_ALIVE_S = 10.0
"""Seconds for which one call keeps a candidate. An ingress that has died does not repeat the call."""
STATUS_INTERVAL_S = 0.5
"""Seconds between two statuses that such a call returns."""
EXTRA_DRAIN_S = 30.0
"""Seconds beyond `request_timeout_s` in which answers in progress must have ended."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a replica."""

    replica: str
    """Name of the replica in Ray Serve."""
    version: int
    """Number of the version that answers; 0 while a candidate starts."""
    loaded: tuple[int, ...]
    """Numbers of the versions that can answer."""
    asked: int
    """How many requests the replica has got since its start."""
    max_model_len: int = 0
    """Most tokens of prompt and answer together; 0 while a candidate starts."""
    error: str | None = None
    """Why the replica could not follow the registry's state; None if it could."""
    failed: int | None = None
    """Number of the version that `error` is about."""


class Engine:
    """The Ray Serve deployment that holds the weights."""

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._begin(settings)
        state = self._registry.state()  # it may have changed since the service started
        await self._start(settings, state, state.current)
        self._follow_task = asyncio.create_task(self._versions.follow())

    def _begin(self, settings: EngineSettings) -> None:
        self._cleanup = ExitStack()
        self._num_requests = 0
        self._replica: str = serve.get_replica_context().replica_id.unique_id
        self._registry = Registry(Path(settings.registry))

    async def _start(self, settings: EngineSettings, state: State, number: int, *, is_candidate: bool = False) -> None:
        """Loads a version; returns when it can answer.

        Raises:
            AlignmentError: there is no such version, one of its files has changed, or vLLM does not start.
        """
        set_environment(settings)
        registry = self._registry
        self._served_model = served_version(settings.config, registry, number)
        verification = asyncio.ensure_future(asyncio.to_thread(registry.verify, number))
        try:
            client = await self._start_engine(settings)
        finally:
            await verification  # an error of the files says more than the engine's error about them
        self._trials = Trials(lambda: _tokenizer_info(client), settings.config.limits)
        self._cleanup.callback(self._trials.close)
        reads_text = settings.config.control_tokens == "text"
        self._control_tokens = read_shielded_prompts(client.renderer) if reads_text else None
        self._tokenization = _tokenization(self._server.engine)
        loader: Loader
        if self._served_model.adapter:
            loader = AdapterLoader(client, self._server.engine._oai_models, registry)
            await loader.load(number)
        else:
            loader = WholeWeightsLoader(client, registry, number)
            await loader.begin()
        self._versions = Versions(
            registry,
            loader,
            limits=MoveLimits(
                drain_s=settings.config.request_timeout_s + EXTRA_DRAIN_S, wait_s=settings.config.promotion_wait_s
            ),
            target=candidate_version if is_candidate else fleet_version,
            lock_file=None if is_candidate else registry.folder / TURN_LOCK,
        )
        self._versions.begin(state, number)
        try:
            await self._versions.adopt()  # it may have changed meanwhile
        except AlignmentError:  # then it answers with the version that it has, as after a later change
            logger.exception("A replica could not follow the registry")
        freeze_heap()

    async def _start_engine(self, settings: EngineSettings) -> AsyncLLM:
        """Starts vLLM; returns when it has computed two tokens.

        Raises:
            ServingError: vLLM does not start, or its weights overflow; the message says why.
        """
        load_vllm()
        from ray.serve.llm.deployment import LLMServer

        with StartLog() as log:
            try:
                config = llm_config(settings, self._served_model, log)
                self._server = LLMServer.sync_init(config)
                # In place of `server.start()`, which also reports the model to a telemetry actor and takes 3 s more.
                self._server.engine = engine_class(settings)(config)
                await self._server.engine.start()
                client: AsyncLLM = self._server.engine._engine_client
                self._cleanup.callback(client.shutdown)
                # An engine that would die with its first request is not ready.
                await probe(client, self._served_model.source)
            except AlignmentError:
                raise
            except Exception as error:  # vLLM passes on any exception of its model code
                reason = log.reason(error, setting_names(settings))
                location = f"{self._served_model.source} on {gethostname()}"
                raise ServingError(f"vLLM does not start with {location}: {reason}") from error
        return client

    async def answer(
        self, route: Route, body: dict[str, Any], model_version: int | None, avoid: tuple[str, ...] = ()
    ) -> AsyncIterator[str | Reply | Redirect]:
        """Answers one request: with server-sent events if it asks for a stream, else with one `Reply`.

        The first item is always a `Reply`, which has no body in a stream; or it is a `Redirect`, and nothing follows.

        Args:
            model_version: number of the version that must answer; None takes the one that this replica holds.
            avoid: names of the replicas that redirected the request. One of them accepts it if it comes back.
        """
        self._num_requests += 1
        has_begun = False
        if self._server.engine._engine_client.errored:
            yield Redirect(replica=self._replica, moves_to=None, is_broken=True)
            return
        try:
            form_s = await self._trials.check([] if route in TOKEN_ROUTES else forms_of(body))
            if "messages" in body and self._control_tokens is not None:
                body = shield_chat(self._control_tokens, body)
            request = self._request(route, body)
            only_echoes = bool(body.get("echo")) and body.get("max_tokens") == 0
            if isinstance(request, Reply):
                yield request
            elif route in TOKEN_ROUTES:
                yield await self._tokenize(route, request)
            elif body["model"] == self._served_model.base_name:
                names = ModelNames(
                    client_name=body["model"], engine_name=body["model"], form_s=form_s, only_echoes=only_echoes
                )
                async for reply in self._replies(route, request, names):
                    has_begun = True
                    yield reply
            else:
                start_s = time.perf_counter()
                async with self._versions.hold(model_version, may_leave=self._replica not in avoid) as number:
                    names = ModelNames(
                        client_name=body["model"],
                        engine_name=self._served_model.version_name(number),
                        version=number,
                        version_s=time.perf_counter() - start_s,
                        form_s=form_s,
                        only_echoes=only_echoes,
                    )
                    async for reply in self._replies(route, request, names):
                        has_begun = True
                        yield reply
        except ReplicaUnavailable as error:
            yield Redirect(replica=self._replica, moves_to=error.moves_to, is_broken=error.is_broken)
        except RequestError as error:
            yield error.reply
        except ServingError as error:
            yield error_reply(409, str(error))
        except Exception:  # the client must get an answer, but not the exception's text
            logger.exception("A request failed in the engine")
            if self._server.engine._engine_client.errored:
                raise  # the ingress answers; no other replica gets a request that may have killed this engine
            failure = error_reply(500, "The engine failed on this request.")
            if FORM_FIELDS & body.keys():  # the grammar is compiled after the engine has accepted the request
                failure = error_reply(400, "The engine could not answer in the form that was asked for.")
            yield event(failure) if has_begun else failure

    def _request(self, route: Route, body: dict[str, Any]) -> Any:
        return parse_request(route, body)

    async def _tokenize(self, route: Route, request: Any) -> Reply:
        """The token ids of a text or a chat, rendered as for an answer; or the text of token ids."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        if route == "detokenize":
            largest = self._server.engine._engine_client.renderer.get_tokenizer().max_token_id
            if max(request.tokens, default=0) > largest:
                message = f"A token id is out of the vocabulary, whose largest one is {largest}."
                return error_reply(400, message, param="tokens")
        ask = self._tokenization.create_tokenize if route == "tokenize" else self._tokenization.create_detokenize
        try:
            result = await ask(request, None)
        except Exception as error:  # a template may raise any exception about messages that it does not expect
            logger.info("A text could not be tokenized: %s", type(error).__name__)
            return error_reply(400, "The chat template, or the tokenizer, does not take this.")
        if isinstance(result, ErrorResponse):
            return engine_error(result.error.code, result.error.message)
        return Reply(status=200, body=result.model_dump_json(exclude_none=True))

    async def _replies(self, route: Route, request: Any, names: ModelNames) -> AsyncIterator[str | Reply]:
        request.model = names.engine_name
        has_begun = False
        async for batch in batch_items(await getattr(self._server, route)(request)):
            reply = to_reply(batch, names, is_first=not has_begun)
            if isinstance(reply, str) and not has_begun:
                reply = Reply(
                    status=200,
                    body="",
                    events=reply,
                    version=names.label,
                    version_s=names.version_s,
                    form_s=names.form_s,
                )
            has_begun = True
            yield reply

    async def status(self) -> Status:
        """The versions that this replica holds, after a check that it can answer."""
        await self.check_health()
        return self._status()

    async def adopt(self) -> Status:
        """Follows the registry's state."""
        return await self._status_after(self._versions.adopt())

    async def prepare(self, number: int) -> Status:
        """Prepares a version, as far as this does not affect requests."""
        return await self._status_after(self._versions.prepare(number))

    async def move(self, number: int, replica: str) -> Status:
        """Changes to a version of whole weights if `replica` is this one: Ray Serve calls every replica."""
        return await self._status_after(self._versions.move(number)) if replica == self._replica else self._status()

    async def _status_after(self, move: Awaitable[object]) -> Status:
        error = None
        try:
            await move
        except AlignmentError as problem:
            error = str(problem)
        return self._status(error)

    def _status(self, error: str | None = None) -> Status:
        versions = self._versions
        return Status(
            replica=self._replica,
            version=versions.current,
            loaded=versions.loaded_numbers,
            asked=self._num_requests,
            max_model_len=self._server.engine._engine_client.model_config.max_model_len,
            error=error,
        )

    async def check_health(self) -> None:
        """Ray Serve calls this every 10 s, and replaces the replica if it raises.

        Raises:
            EngineDeadError: the engine has died.
            PartialLoadError: a load failed half-way and left the engine between two versions.
        """
        if self._versions.is_broken:
            raise PartialLoadError("this replica got stuck between two versions")
        await self._server.check_health()

    def __del__(self) -> None:
        """Ends the engine when Ray Serve stops the replica: an engine that is killed leaves its shared memory."""
        self._cleanup.close()


class CandidateEngine(Engine):
    """The deployment of the candidate, a replica that holds the canary of whole weights beside the ordinary replicas.

    It loads the weights after its constructor, so that an error is reported as a status. After an error in the
    constructor, Ray Serve would give the deployment up for good.
    """

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._begin(settings)
        self._settings = settings
        self._is_up = False
        self._failure: LoadFailure | None = None
        self._follow_task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while (number := candidate_version(state := self._registry.state())) is None:
            await asyncio.sleep(STATUS_INTERVAL_S)
        try:
            await self._start(self._settings, state, number, is_candidate=True)
        except Exception as error:  # vLLM passes on any exception of its model code
            logger.exception("The candidate did not start")
            self._cleanup.close()
            self._failure = LoadFailure(number=number, reason=str(error)[:MAX_MESSAGE])
            return
        self._is_up = True
        await self._versions.follow()

    async def keep_alive(self) -> AsyncIterator[Status]:
        """Keeps this replica for `KEEP_ALIVE_S`, and returns its status at intervals."""
        for _ in range(int(KEEP_ALIVE_S / STATUS_INTERVAL_S)):
            yield self._status()
            await asyncio.sleep(STATUS_INTERVAL_S)

    async def answer(
        self, route: Route, body: dict[str, Any], model_version: int | None, avoid: tuple[str, ...] = ()
    ) -> AsyncIterator[str | Reply | Redirect]:
        """Answers as an ordinary replica; before it has loaded a version, it redirects every request."""
        if not self._is_up:
            yield Redirect(replica=self._replica, moves_to=None)
            return
        async for reply in super().answer(route, body, model_version, avoid):
            yield reply

    def _status(self, error: str | None = None) -> Status:
        failure = self._versions.failure if self._is_up else self._failure
        return Status(
            replica=self._replica,
            version=self._versions.current if self._is_up else 0,
            loaded=self._versions.loaded_numbers if self._is_up else (),
            asked=self._num_requests,
            error=failure.reason if failure else None,
            failed=failure.number if failure else None,
        )

    async def check_health(self) -> None:
        """As for an ordinary replica; one that did not start is replaced when another version becomes the canary."""
        if self._is_up:
            await super().check_health()
        elif self._failure is not None and candidate_version(self._registry.state()) != self._failure.number:
            raise PartialLoadError(f"the candidate did not start: {self._failure.reason}")


def _tokenization(engine: VLLMEngine) -> ServingTokenization:
    """vLLM's tokenization of texts and chats. Ray Serve LLM looks for it under an older name."""
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

    renderer = engine._oai_serving_chat.online_renderer
    return ServingTokenization(
        engine._oai_models,
        renderer,
        chat_template=renderer.chat_template,
        chat_template_content_format=renderer.chat_template_content_format,
    )


def _tokenizer_info(client: AsyncLLM) -> str:
    """xgrammar's description of the tokenizer, serialised."""
    import xgrammar

    tokenizer, vocabulary = client.renderer.get_tokenizer(), client.model_config.get_vocab_size()
    return str(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary).serialize_json())
