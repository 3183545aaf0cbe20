"""`raylign promote`, `rollback` and `versions`: which version a running endpoint answers with, told from outside.

checkpoint ─► the endpoint copies and checks it ─► loads it beside the one that answers ─► gate ─► switch, or not
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignment.errors import ServingError

if TYPE_CHECKING:
    from serving.client import Listing, Service
    from serving.gate import GateConfig
    from serving.registry import State, Version

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 7200.0
"""Seconds that an endpoint may take to copy a checkpoint, or to load it into every replica: of whole weights, each in
turn waits for its longest answer."""
FIGURES = (
    ("eval/rewards/accuracies", "accuracy"),
    ("eval/reward", "reward"),
    ("eval/kl", "kl"),
    ("eval/length", "tokens"),
    ("eval/loss", "loss"),
)
"""What the list shows of a version's metrics, and under which name."""

Url = Annotated[str, typer.Option(help="Where the endpoint is. The key of an admin is read from $RAYLIGN_KEY.")]


def promote(
    checkpoint: Annotated[
        str, typer.Argument(help="A run's folder, a checkpoint, a model or adapter folder, or a version's number.")
    ],
    url: Url = URL,
    gate: Annotated[
        Path | None, typer.Option(help="YAML file with what it may not lose, as configs/serve/gate.yaml.")
    ] = None,
    canary: Annotated[
        float | None, typer.Option(help="Share of requests to give it for now, above 0 to below 1; all if not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, and ask the gate, but switch nothing.")] = False,
) -> None:
    """Makes a running endpoint answer with another checkpoint, without a request lost.

    The endpoint has to see the same folders. It copies the checkpoint, proves it, and refuses what it cannot change to.
    With --gate, both versions answer held-out prompts first; status 1 says that the candidate lost more than allowed.
    """
    from serving.client import Service
    from serving.gate import load_gate

    if canary is not None and not 0 < canary < 1:
        raise ServingError(f"--canary is a share of the requests, above 0 to below 1, not {canary:g}")
    config = None if gate is None else load_gate(gate)
    with Service(url, timeout_s=TIMEOUT_S) as service:
        version = _candidate(service, checkpoint)
        state = service.listing().state
        if version.number == state.current:
            typer.echo(f"{_called(version)} answers already.")
        elif config is None:
            _switch(service, version, state, canary, dry_run)
        else:
            with _loaded(service, version, state):
                _examine(config, service, version, state)
                _switch(service, version, state, canary, dry_run)


def rollback(url: Url = URL) -> None:
    """Makes a running endpoint answer with the version before; a canary, if there is one, only ends.

    The next rollback goes one further back.
    """
    from serving.client import Service

    with Service(url, timeout_s=TIMEOUT_S) as service:
        before = service.listing().state
        service.rollback()
        now = service.listing().state
    if before.canary is not None:
        typer.echo(f"Version {before.canary} is no canary any more; version {now.current} answers everything.")
    else:
        typer.echo(f"Version {now.current} answers again, in place of version {before.current}.")


def versions(
    action: Annotated[
        list[str] | None, typer.Argument(metavar="[delete NUMBER...]", help="To free the disk of what nobody needs.")
    ] = None,
    url: Url = URL,
) -> None:
    """Lists the versions that a running endpoint has, what its replicas hold, and the change that is under way; or
    deletes some of them.

    What answers, is being tried, or is one rollback away is not deleted.
    """
    if not action:
        list_versions(url)
    elif action[0] == "delete" and action[1:] and all(number.isdecimal() for number in action[1:]):
        delete_versions([int(number) for number in action[1:]], url)
    else:
        raise ServingError(f"{' '.join(action)} is nothing to do with versions; `raylign versions delete 3 4` is")


def list_versions(url: str) -> None:
    """Prints the versions that a running endpoint has, what its replicas hold, and the change that is under way."""
    from serving.client import Service
    from serving.gate import aligned

    with Service(url, timeout_s=TIMEOUT_S) as service:
        listing = service.listing()
    rows = [("version", "", "kind", "created", "source", "held out")]
    typer.echo(aligned([*rows, *(_row(version, listing.state) for version in listing.versions)]))
    typer.echo(_held(listing))
    change = listing.state.change()
    if change is not None:
        typer.echo(f"{str(change)[0].upper()}{str(change)[1:]}.")


def _held(listing: Listing) -> str:
    """Which replica holds which version, the candidate last."""
    if not listing.replicas and listing.candidate is None:
        return "No replica says what it holds."
    lines = [f"Replica {each.replica} holds version {each.version}." for each in listing.replicas]
    candidate = listing.candidate
    if candidate is not None:
        name = f"The candidate's replica {candidate.replica}"
        if candidate.error is not None:
            lines.append(f"{name} cannot load version {candidate.failed}: {candidate.error}")
        else:
            lines.append(f"{name} {f'holds version {candidate.version}' if candidate.version else 'starts'}.")
    return "\n".join(lines)


def delete_versions(numbers: list[int], url: str) -> None:
    """Deletes versions of a running endpoint, one after the other."""
    from serving.client import Service

    with Service(url, timeout_s=TIMEOUT_S) as service:
        for number in numbers:
            freed = service.delete(number)
            typer.echo(f"Version {number} is deleted; {freed / 2**20:.3g} MiB are free again.")


def _candidate(service: Service, checkpoint: str) -> Version:
    """The version that is asked for: a new one, or one that is known by its number."""
    path = Path(checkpoint).expanduser()
    if checkpoint.isdecimal() and not path.exists():
        known = {version.number: version for version in service.listing().versions}
        if int(checkpoint) not in known:
            raise ServingError(f"{service.url} has no version {checkpoint}; it has {', '.join(map(str, known))}")
        return known[int(checkpoint)]
    typer.echo(f"The endpoint copies and checks {path} …")
    return service.register(str(path.absolute()))


@contextmanager
def _loaded(service: Service, version: Version, state: State) -> Iterator[None]:
    """Has a version loaded beside the one that answers, without any requests; let go of afterwards, if nothing has
    become of it. One that is a canary already stays that."""
    try:
        if state.canary != version.number:
            typer.echo(f"Loading {_called(version)} beside version {state.current} …")
            service.promote(version.number, canary=0.0)
        yield
    finally:
        now = service.listing().state
        if now.canary == version.number and not now.share:
            service.end_canary()


def _examine(config: GateConfig, service: Service, version: Version, state: State) -> None:
    """Holds a version against the current one, and prints the figures.

    Raises:
        typer.Exit: it did not pass; it is no canary any more.
    """
    from serving.client import Service
    from serving.gate import evaluate, judge

    with Service(service.url, timeout_s=config.timeout_s) as examined:
        current, candidate = evaluate(config, examined, [state.current, version.number])
    now = service.listing().state
    if (now.current, now.canary) != (state.current, version.number):
        raise ServingError(
            f"the versions of {service.url} were changed meanwhile: version {now.current} answers, and the canary is "
            f"{now.canary}. The comparison with version {state.current} is void; run the command again"
        )
    verdict = judge(current, candidate, config.margins)
    typer.echo(verdict.table(f"version {state.current}", f"version {version.number}"))
    if not verdict.passed:
        service.end_canary()
        typer.echo(f"{_called(version)} is worse than allowed, and was not promoted.")
        raise typer.Exit(1)


def _switch(service: Service, version: Version, state: State, canary: float | None, dry_run: bool) -> None:
    if dry_run:
        typer.echo(f"{_called(version)} may be promoted. Nothing was switched.")
        return
    typer.echo(f"Switching to {_called(version)} …")
    service.promote(version.number, canary=canary)
    if canary is None:
        typer.echo(
            f"Version {version.number} answers, in place of version {state.current}; `raylign rollback` undoes it."
        )
    else:
        typer.echo(
            f"Version {version.number} answers {canary:.3g} of the requests. `raylign promote {version.number}` gives "
            "it all, and `raylign rollback` none."
        )


def _row(version: Version, state: State) -> tuple[str, ...]:
    marks = {state.previous: "previous", state.canary: f"canary {state.share:.3g}", state.current: "current"}
    figures = [f"{name} {version.metrics[key]:.3g}" for key, name in FIGURES if key in version.metrics]
    return (
        str(version.number),
        marks.get(version.number, ""),
        version.kind,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created)),
        version.source,
        ", ".join(figures),
    )


def _called(version: Version) -> str:
    return f"version {version.number} ({version.name})"
