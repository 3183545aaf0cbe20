"""Requests on their way into vLLM, and its answers on their way out: in OpenAI's form, with the client's model name.

Names of Ray that are not public: `ErrorResponse` (`to_reply`).
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from serving.schema import TOKEN_ROUTES, Reply, Route, error_reply, event, validation_error_reply

logger = logging.getLogger("ray.serve")

VLLM_FINGERPRINT = re.compile(r',"system_fingerprint":(?:null|"[^"\\]*")')
"""vLLM's own fingerprint in the last events of a stream. In a text of the answer, the quotation marks are escaped."""
TOO_LONG = re.compile("maximum context length|max_model_len|longer than the maximum model length")
"""Matches vLLM's messages about a prompt that is too long."""
USAGE = re.compile(r'"prompt_tokens":(\d+),"total_tokens":\d+,"completion_tokens":\d+')
"""The counts of tokens in an answer, and in an event of a stream."""
MAX_MESSAGE = 1000
"""Most characters of an error message, which may quote the request."""


def parse_request(route: Route, body: dict[str, Any]) -> Any:
    """vLLM's request for a body, or the `Reply` that refuses it."""
    from pydantic import ValidationError
    from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import (
        DetokenizeRequest,
        TokenizeChatRequest,
        TokenizeCompletionRequest,
    )
    from vllm.exceptions import VLLMClientError

    kinds: dict[Route, Any] = {
        "chat": ChatCompletionRequest,
        "completions": CompletionRequest,
        "tokenize": TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest,
        "detokenize": DetokenizeRequest,
    }
    if route in TOKEN_ROUTES:
        body = body | {"model": None}  # all models have the same tokenizer, and vLLM does not know the client's name
    try:
        return kinds[route].model_validate(body)
    except ValidationError as error:
        return validation_error_reply(error.errors(), body)
    except VLLMClientError as error:
        return error_reply(400, f"The request is not valid. {error}"[:MAX_MESSAGE])


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """The names of one request's model, and what it took to prepare the answer."""

    client_name: str
    """The client's name for the model."""
    engine_name: str
    """vLLM's name for the model."""
    version: int | None = None
    """Number of the version; None for the base model of an adapter, which has no versions."""
    version_s: float = 0.0
    """Seconds that it took to find the version."""
    form_s: float = 0.0
    """CPU seconds that it took to compile the answer's form on trial."""
    only_echoes: bool = False
    """Whether the answer is the prompt alone: vLLM generates a token nevertheless, and counts it."""

    @property
    def label(self) -> str:
        """The version as a response header and the metrics show it."""
        return "base" if self.version is None else str(self.version)

    def rewrite(self, text: str) -> str:
        """One server-sent event with the client's name for the model, and with the version as fingerprint.

        Only the event's own field matches: in a text of the answer, the quotation marks are escaped.
        """
        text = VLLM_FINGERPRINT.sub("", text) if "system_fingerprint" in text else text
        text = self.count(text)
        return text.replace(*self._replacement, 1)

    def count(self, text: str) -> str:
        """Returns an answer, or an event of a stream, with the right counts of tokens."""
        echo_counts = r'"prompt_tokens":\1,"total_tokens":\1,"completion_tokens":0'
        return USAGE.sub(echo_counts, text) if self.only_echoes else text

    @cached_property
    def _replacement(self) -> tuple[str, str]:
        client_fields = f'"model":{json.dumps(self.client_name)},"system_fingerprint":"{self.label}"'
        return f'"model":{json.dumps(self.engine_name)}', client_fields


def to_reply(batch: list[Any], names: ModelNames, *, is_first: bool) -> str | Reply:
    """Translates Ray Serve LLM's answers: into the text of events, or into a `Reply` with an answer or an error.

    Args:
        is_first: whether nothing of the answer has been sent, so that an error can still be its status.
    """
    # The public class of this name is a subclass of the one that Ray Serve LLM uses.
    from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse

    items = [item for entry in batch for item in (entry if isinstance(entry, list) else [entry])]
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            error = _error_of(item)
            if error is not None and is_first and not texts:
                return error
            texts.append(names.rewrite(item) if error is None else event(error))
        elif isinstance(item, ErrorResponse):
            return engine_error(item.error.code, item.error.message.replace(names.engine_name, names.client_name))
        else:
            item.model, item.system_fingerprint = names.client_name, names.label
            body = names.count(item.model_dump_json())
            return Reply(status=200, body=body, version=names.label, version_s=names.version_s, form_s=names.form_s)
    return "".join(texts)


def engine_error(status: int, message: str) -> Reply:
    """The reply for an error of the engine. Its message reaches the client only if the request caused the error."""
    if status < 500:
        is_too_long = status == 400 and TOO_LONG.search(message) is not None
        return error_reply(status, message[:MAX_MESSAGE], code="context_length_exceeded" if is_too_long else None)
    logger.error("The engine answered with an error: %s", message)
    return error_reply(500, "The engine failed on this request.")


def _error_of(text: str) -> Reply | None:
    """Returns the failure that a server-sent event of vLLM reports, without its exception's text; None for others."""
    if not text.startswith('data: {"error"'):
        return None
    error = json.loads(text.removeprefix("data: "))["error"]
    return engine_error(error["code"], error["message"])
