"""What every test may use: a tiny random Llama with a tokenizer of its own, and short ways to write files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import alignment  # noqa: F401  # sets what OpenMP reads when a test loads torch

# Read when ray is imported, by whichever test comes first: without it, Ray replaces 127.0.0.1 by the outside address.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

ALIGN = Path(__file__).parents[1] / "configs" / "align"
RECIPES = sorted(path for path in ALIGN.glob("*.yaml") if "stages" not in yaml.safe_load(path.read_text()))
"""Every file of one run; the others chain several."""
DATA = Path(__file__).parent / "data"
"""A few real rows of public sets; its README says of which."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog while 12 + 30 = 42, and what is the capital of France? Paris!"


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 350 tokens, with ChatML, as Llama-like models have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def read_data(name: str) -> list[dict[str, Any]]:
    """The rows of a file of `tests/data`."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


SHARED = {
    "endpoint": [
        "test_client_habits",
        "test_endpoint",
        "test_feedback_routes",
        "test_page_for_real",
        "test_ports",
        "test_records",
        "test_rewards_route",
        "test_swap",
        "test_tools",
    ],
    "ray_here": ["test_engines", "test_ray_access", "test_rollouts_on_ray", "test_train_on_ray", "test_zero_on_ray"],
    "light_ray": [
        "test_metrics",
        "test_rolling",
        "test_scorer_start",
        "test_several_models",
        "test_start_without_database",
    ],
    "small_endpoint": ["test_circle", "test_contract", "test_swap_of_whole_weights"],
}
"""Fixtures that take long to start, and the files whose tests share them: these run in one piece, in one process and
before all others, so that two processes (`make test`) end at about the same time."""
PIECES = {file: fixture for fixture, files in SHARED.items() for file in files}


def piece_of(nodeid: str) -> str:
    """The fixture of `SHARED` that a test's file needs, else the file."""
    file = nodeid.partition("::")[0]
    return PIECES.get(Path(file).stem, file)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(SHARED)
    pieces = {item: piece_of(item.nodeid) for item in items}
    for item, piece in pieces.items():
        shared = set(order) & set(getattr(item, "fixturenames", ()))
        assert shared <= {piece}, f"{item.nodeid} starts {shared} once more: name its file in SHARED"
    items.sort(key=lambda item: order.index(pieces[item]) if pieces[item] in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a whole piece to a process that has nothing to do."""
    from xdist.scheduler import LoadScopeScheduling

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return piece_of(nodeid)

    return Pieces(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends a fixture of `SHARED` after its last test; pytest would keep it, and its processes, until the very end."""
    piece = piece_of(item.nodeid)
    if piece in SHARED and (nextitem is None or piece_of(nextitem.nodeid) != piece):
        # From the session: the last test may be one that does without the fixture.
        definitions = item.session._fixturemanager.getfixturedefs(piece, item) or ()
        for definition in definitions[-1:]:
            definition.finish(item._request)  # type: ignore[attr-defined]


class Deselected:
    """How many tests were left out; all processes of `pytest -n 2` leave out the same, and tell it when they end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.count = config, 0

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.count += len(items)

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["deselected"] = self.count

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.count = getattr(node, "workeroutput", {}).get("deselected", self.count)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Deselected(config), "deselected")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Ends a run by one line with all that was not tested, and why."""
    yield
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    parts = [f"{count} × {reason}" for reason, count in reasons.most_common()]
    if count := terminalreporter.config.pluginmanager.getplugin("deselected").count:
        parts.append(f"{count} that were not selected, as the slow ones, which `make test-slow` runs")
    terminalreporter.write_line(f"Not tested: {'; '.join(parts) or 'nothing'}")


def ports() -> Iterator[int]:
    """Numbers of ports that nobody else takes: neither the system for a connection, nor another process of `pytest -n`.

    The system numbers connections from 32768 on, and Ray's workers listen below 20000.
    """
    place = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    start = random.Random(os.getpid()).randrange(3000)
    while True:
        yield from (20_000 + 3000 * place + (start + number) % 3000 for number in range(3000))


PORTS = ports()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on, a new one each time."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("ports do not end")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(tokenizer: Any, **changes: Any) -> Any:
    """The `LlamaConfig` of two layers with grouped-query attention, of a size that vLLM takes on a CPU."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "head_dim": 32,  # the least that vLLM takes on a CPU
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # large enough that different texts get clearly different probabilities
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**settings | changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (fp32, tied embeddings, grouped-query attention) and its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines: `write_rows([...], "pairs.jsonl")`. A string is written as it stands."""

    def write(rows: list[dict[str, Any] | str], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Preference pairs of different lengths, in words that the tiny tokenizer knows."""
    words = TEXT.split()
    return [
        {
            "prompt": " ".join(words[i % 7 : i % 7 + 3 + i % 4]),
            "chosen": " " + " ".join(words[(i * 3) % 11 : (i * 3) % 11 + 2 + i % 5]),
            "rejected": " " + " ".join(words[(i * 5 + 1) % 9 : (i * 5 + 1) % 9 + 4 + i % 3]) + f" {i}",
        }
        for i in range(count)
    ]


@pytest.fixture
def run_settings(tiny_model: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> dict[str, Any]:
    """Settings of a small DPO run on the tiny model in fp32, to be changed at will and given to `RunConfig`."""
    return {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "steps": 4,
        "groups_per_step": 4,
        "algorithm": {"name": "dpo"},
        "model": {"path": str(tiny_model), "dtype": "fp32"},
        "data": {"path": str(write_rows(pair_rows(24), "pairs.jsonl")), "max_length": 96, "eval_groups": 4},
        "optim": {"lr": 1e-3, "schedule": "constant"},
    }


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server without the name of a database; skips where none can run."""
    from tests.databases import postgresql_server

    with postgresql_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables, once of SQLite and once of PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'feedback.sqlite'}"
    from tests.databases import new_schema

    return new_schema(request.getfixturevalue("postgresql"))
