"""The pages for people: links lead somewhere, lines are short, and what can be typed is what the code takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from alignment.settings.load import load_config
from alignment.settings.plugins import ScorerConfig, algorithm_class, algorithm_names, scorer_class, scorer_names
from alignment.settings.section import Section, sections_of
from cluster.cli import COMMANDS
from cluster.config import ClusterRunConfig, load_run
from cluster.pipeline import PipelineConfig
from serving.config import ServeConfig, load_serve_config
from serving.registry.gate import GateConfig, load_gate
from tests.test_operations import parsed

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WRITTEN_PAGES = [page for page in PAGES if page.parent.name not in ("how-to", "reference")]
"""Without the how-to pages, which `test_how_to` runs, and the references, which `test_references` makes again."""
LONGEST_LINE = 150
LONGEST_README = 150
"""Lines."""
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?:alignment|cluster|serving|configs|tests|docs)/[\w./-]+\.(?:py|yaml|jsonl|txt|md|svg|html)")
ELSEWHERE = re.compile(r"[a-z]+:")
"""How a link to another site begins."""
KINDS: dict[str, type[Section]] = {
    "yaml": ClusterRunConfig,
    "yaml serve": ServeConfig,
    "yaml gate": GateConfig,
    "yaml pipeline": PipelineConfig,
}
"""What a block of code of that language holds. Any other word behind `yaml` names a file of another program."""
REST: dict[str, dict[str, Any]] = {
    "yaml": {"name": "page", "algorithm": {"name": "sft"}, "data": {"path": "rows.jsonl"}},
    "yaml serve": {"checkpoint": "runs/demo"},
    "yaml gate": {"data": {"path": "rows.jsonl"}},
    "yaml pipeline": {"name": "page"},
}
"""What a block that shows only a part of a file is completed with."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code on a page."""

    page: Path
    language: str
    text: str
    number: int
    """On its page, from 1."""

    @property
    def name(self) -> str:
        return f"{name_of(self.page)}:{self.number}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    fences = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(page=page, language=fence[2].strip(), text=fence[3].replace(f"\n{fence[1]}", "\n"), number=number)
        for number, fence in enumerate(fences, start=1)
    ]


BLOCKS = [block for page in WRITTEN_PAGES for block in blocks_of(page)]
YAML_BLOCKS = [block for block in BLOCKS if block.language in KINDS]


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose_of(page))]


def anchors_of(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


# ------------------------------------------------------------------------------------------------------------- form


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(re.sub(r"`[^`]*`", "", prose_of(page))):
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_there = file.exists() and file.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(prose_of(page)) if not ELSEWHERE.match(target))
        pages = {(page.parent / target).resolve() for target in targets if target.endswith(".md")}
        waiting += [page for page in pages if page not in reached and page.is_file()]
    assert [name_of(page) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, start=1) if len(line) > LONGEST_LINE]
    assert long == [], f"longer than {LONGEST_LINE} characters"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", WRITTEN_PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # which speaks of what was
        return
    named = {file for code in inline_code(page) for file in FILE.findall(code)}
    assert sorted(file for file in named if not (ROOT / file).is_file()) == []


# --------------------------------------------------------------------------------------------- what can be typed


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=lambda block: block.name)
def test_a_yaml_block_loads(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "rewards.py").write_text(own_function())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("alignment.settings.old_names._log_old_name", refuse_old_name)
    file = tmp_path / "page.yaml"
    file.write_text(yaml.safe_dump(completed(yaml.safe_load(block.text), REST[block.language])), encoding="utf-8")
    if block.language == "yaml":
        load_run(file, [])
    elif block.language == "yaml gate":
        load_gate(file)
    else:
        load_config(file, kind=KINDS[block.language])


def refuse_old_name(old: str, new: str) -> None:
    """Stands for the note about a setting's old name: pages use the new ones."""
    raise AssertionError(f"{old} is the old name of {new}")


def own_function() -> str:
    """The reader's own `my_package.rewards`, as the page of rewards shows it."""
    (code,) = [block.text for block in BLOCKS if block.language == "python" and block.page.name == "rewards.md"]
    return code


def test_the_function_for_rewards_gives_rewards() -> None:
    module: dict[str, Any] = {}
    exec(own_function(), module)
    rewards = module["politeness"](prompts=["a", "b"], completions=["Please.", "No."], factor=2.0, answer=["x", "y"])
    assert rewards == [2.0, 0.0]


PYTHON_BLOCKS = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.name)
def test_a_python_block_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec")


def completed(tree: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """A part of a file with what it leaves out."""
    whole = {**rest, **tree}
    if "algorithm" in whole and not {"steps", "epochs"} & whole.keys():
        whole["steps"] = 10
    data = whole.get("data")
    if isinstance(data, dict) and not {"path", "mixture"} & data.keys():
        whole["data"] = {**rest.get("data", {}), **data}
    return whole


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each `raylign …` and `python -m cluster …` in a text."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        start = re.match(r"^(?:\$ )?(?:\.venv/bin/)?(raylign|python -m cluster) (.+)", re.sub(r"\s{2,}#.*", "", line))
        if start is None:
            continue
        words = shlex.split(start[2].partition(" …")[0])
        yield words if start[1] == "raylign" else ["train", *words]


TYPED = [(block.name, words) for block in BLOCKS for words in commands_of(block.text)] + [
    (name_of(page), words) for page in WRITTEN_PAGES for code in inline_code(page) for words in commands_of(code)
]


@pytest.mark.parametrize(
    ("place", "words"), TYPED, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_command_has_these_arguments_and_settings(
    place: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if len(words) == 1 and (words[0] in COMMANDS or words[0] == "--help"):
        return  # a sentence names the command
    if words[0].isupper():
        return  # `raylign COMMAND --help`
    arguments = parsed(words)
    if words[0] == "train" and Path(arguments["config"]).is_file():
        load_run(Path(arguments["config"]), list(arguments["overrides"] or []))
    if words[0] == "serve":
        load_serve_config(arguments["checkpoint"], list(arguments["overrides"] or []), arguments["config"])


SECTION_KEY = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)+(?:=\S*)?")


def known_keys() -> set[str]:
    """Every key of a run, an endpoint and a gate, by its dotted name."""
    keys = {key for kind in (ClusterRunConfig, ServeConfig, GateConfig) for key in keys_below(kind)}
    keys |= {f"algorithm.{key}" for name in algorithm_names() for key in algorithm_class(name).model_fields}
    return keys | {f"{part}.{key}" for part in ("rewards", "eval_rewards") for key in scorer_keys()}


def scorer_keys() -> set[str]:
    return {key for name in scorer_names() for key in scorer_class(name).model_fields} | set(ScorerConfig.model_fields)


def keys_below(kind: type[Section], above: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield above + name
        for section in sections_of(field.annotation):
            yield from keys_below(section, f"{above}{name}.") if section is not kind else ()


def test_keys_that_pages_name_are_keys() -> None:
    known = known_keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    unknown = [
        f"{name_of(page)}: {code}"
        for page in WRITTEN_PAGES
        if page.name != "CHANGELOG.md"
        for code in inline_code(page)
        if SECTION_KEY.fullmatch(code) and code.partition(".")[0] in sections
        if re.sub(r"\.\d+", "", code.partition("=")[0]) not in known
        and code.rpartition(".")[2] not in ("py", "md", "json", "yaml", "jsonl", "html", "safetensors")
    ]
    assert unknown == []


# ----------------------------------------------------------------------------------------------- algorithms, rewards


def tables_of(page: str, first: str) -> dict[str, dict[str, str]]:
    """Of each section, what its table of keys says: keys and defaults, whose head begins with `first`."""
    tables: dict[str, dict[str, str]] = {}
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for part in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        _, head, rows = body.partition(f"| {first} | default |")
        cells = re.findall(r"^\| `(\w+)` \| (.+?) \|", rows.partition("\n\n")[0], re.MULTILINE) if head else []
        if cells:
            tables[title.strip("` ")] = {key: default.strip("`") for key, default in cells}
    return tables


def default_text(field: FieldInfo) -> str:
    """A default as pages write it."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


SHARED = "What all of these share"
"""The section of the keys that all policy gradients have."""


def test_the_page_of_algorithms_has_all_their_keys_with_their_defaults() -> None:
    tables = tables_of("algorithms.md", "key")
    shared = tables.pop(SHARED)
    assert set(tables) == {name for name in algorithm_names() if set(algorithm_class(name).model_fields) - {"name"}}
    for name, table in tables.items():
        fields = {
            key: default_text(field) for key, field in algorithm_class(name).model_fields.items() if key != "name"
        }
        if "clip_low" in fields:
            assert set(shared) <= set(fields), name
            table = shared | table
        assert table == fields, name


def test_the_page_of_rewards_has_all_scorers_with_their_keys_and_defaults() -> None:
    tables = tables_of("rewards.md", "key")
    shared = tables.pop("Every scorer")
    assert shared == {key: default_text(field) for key, field in ScorerConfig.model_fields.items() if key != "name"}
    assert set(tables) == set(scorer_names()) | {"A function of your own"}
    for name in scorer_names():
        fields = {key: default_text(field) for key, field in scorer_class(name).model_fields.items() if key != "name"}
        assert shared | tables[name] == fields, name
    function = scorer_class("tests.test_pages:constant_reward").model_fields
    own = {key: default_text(field) for key, field in function.items() if key != "name"}
    assert shared | tables["A function of your own"] == own


def constant_reward(prompts: list[str], completions: list[str]) -> list[float]:
    """A function of one's own."""
    return [1.0] * len(completions)
