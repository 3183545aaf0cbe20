"""What tests share: a reader of rows for any algorithm, and two workers of one process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment.algorithms import Algorithm
from alignment.data.chat import GroupTokenizer
from alignment.data.reader import GroupReader
from alignment.data.stream import Data, load_data
from alignment.groups import Group
from alignment.settings.data import DataConfig
from alignment.settings.plugins import algorithm_class
from tests.conftest import make_tokenizer

if TYPE_CHECKING:
    from tests.alignment.test_zero import Workers

WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def extensions_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch compiles extensions, as a worker leaves it that was killed while it compiled DeepSpeed's operator."""
    folder = tmp_path_factory.mktemp("extensions")
    (folder / "deepspeed_shm_comm").mkdir()
    (folder / "deepspeed_shm_comm" / "lock").touch()
    return folder


@pytest.fixture(scope="session")
def workers(extensions_folder: Path) -> Iterator[Workers]:
    """Two processes with a gloo group between them."""
    from tests.alignment.test_zero import Workers

    started = Workers({"TORCH_EXTENSIONS_DIR": str(extensions_folder)})
    yield started
    started.stop()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def reader(tokenizer: Any, tmp_path: Path) -> Callable[..., GroupReader]:
    """A reader of the given data settings, by default for DPO; it names bad rows in `bad_rows.jsonl`."""

    def make(algorithm: str = "dpo", rewards: Any = (), eval_rewards: Any = (), **settings: Any) -> GroupReader:
        data = DataConfig(**settings)
        chosen = algorithm_class(algorithm).model_validate({"name": algorithm})
        assert isinstance(chosen, Algorithm)
        tokenize = GroupTokenizer(tokenizer, data, frozenset({tokenizer.eos_token_id}))
        return GroupReader(
            data, chosen, tokenize, tmp_path / "bad_rows.jsonl", rewards=rewards, eval_rewards=eval_rewards
        )

    return make


def load(reader: GroupReader, seed: int = 0) -> Data:
    return load_data(reader, seed=seed, progress=False)


def lines_of(groups: list[Group]) -> list[int]:
    return [int(group.id.rpartition(":")[2]) for group in groups]
