"""`raylign promote`, `rollback` and `versions`: the commands that change and list the versions of a running endpoint.

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
from alignment.storage import is_url

if TYPE_CHECKING:
    from serving.registry.client import EndpointClient, Listing
    from serving.registry.gate import GateConfig
    from serving.registry.state import State
    from serving.registry.versions import Version

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 7200.0
"""Seconds that an endpoint may take to copy a checkpoint, or to load it into every replica. With whole weights the
replicas change one after the other, and each waits for its longest answer."""
SHOWN_METRICS = (
    ("eval/rewards/accuracies", "accuracy"),
    ("eval/reward", "reward"),
    ("eval/kl", "kl"),
    ("eval/length", "tokens"),
    ("eval/loss", "loss"),
)
"""The metrics that the list shows of a version, each with its name there."""

Url = Annotated[str, typer.Option(help="Where the endpoint is. The key of an admin is read from $RAYLIGN_KEY.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Name of the model; needed where the endpoint has several.")
]


def promote(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run's folder or address (s3://…), a checkpoint, a model or adapter folder, or a version's number."
        ),
    ],
    url: Url = URL,
    model: ModelOption = None,
    gate: Annotated[
        Path | None, typer.Option(help="YAML file with what it may not lose, as configs/serve/gate.yaml.")
    ] = None,
    canary: Annotated[
        float | None, typer.Option(help="Share of requests to give it for now, above 0 to below 1; all if not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, and ask the gate, but switch nothing.")] = False,
) -> None:
    """Makes a running endpoint answer with another checkpoint, without losing a request.

    The endpoint must see the same folders. It copies the checkpoint, checks it, and refuses one that it cannot change
    to. With --gate, both versions answer held-out prompts first; exit status 1 means that the candidate was worse than
    the gate allows.
    """
    from serving.registry.client import EndpointClient
    from serving.registry.gate import load_gate

    if canary is not None and not 0 < canary < 1:
        raise ServingError(f"--canary is a share of the requests, above 0 to below 1, not {canary:g}")
    config = None if gate is None else load_gate(gate)
    with EndpointClient(url, timeout_s=TIMEOUT_S, model=model) as client:
        version = _candidate_version(client, checkpoint)
        state = client.listing().state
        if version.number == state.current:
            typer.echo(f"{_label(version)} answers already.")
        elif config is None:
            _switch(client, version, state, canary, dry_run)
        else:
            with _loaded_canary(client, version, state):
                _run_gate(config, client, version, state)
                _switch(client, version, state, canary, dry_run)


def rollback(url: Url = URL, model: ModelOption = None) -> None:
    """Makes a running endpoint answer with its previous version. If there is a canary, only the canary ends.

    Each further rollback goes one version further back.
    """
    from serving.registry.client import EndpointClient

    with EndpointClient(url, timeout_s=TIMEOUT_S, model=model) as client:
        previous_state = client.listing().state
        client.rollback()
        state = client.listing().state
    if previous_state.canary is not None:
        typer.echo(
            f"Version {previous_state.canary} is no canary any more; version {state.current} answers everything."
        )
    else:
        typer.echo(f"Version {state.current} answers again, in place of version {previous_state.current}.")


def versions(
    action: Annotated[
        list[str] | None, typer.Argument(metavar="[delete NUMBER...]", help="Deletes these versions, to free the disk.")
    ] = None,
    url: Url = URL,
    model: ModelOption = None,
) -> None:
    """Lists the versions of a running endpoint, the version that each replica holds, and the change in progress; or
    deletes versions.

    The current version, the canary, and the version that a rollback returns to cannot be deleted.
    """
    if not action:
        list_versions(url, model)
    elif action[0] == "delete" and action[1:] and all(number.isdecimal() for number in action[1:]):
        delete_versions([int(number) for number in action[1:]], url, model)
    else:
        raise ServingError(f"{' '.join(action)} is nothing to do with versions; `raylign versions delete 3 4` is")


def list_versions(url: str, model: str | None = None) -> None:
    """Prints the versions of a running endpoint, the version that each replica holds, and the change in progress."""
    from serving.registry.client import EndpointClient
    from serving.registry.gate import format_table

    with EndpointClient(url, timeout_s=TIMEOUT_S, model=model) as client:
        listing = client.listing()
    rows = [("version", "", "kind", "created", "source", "held out")]
    typer.echo(format_table([*rows, *(_row(version, listing.state) for version in listing.versions)]))
    typer.echo(_replica_report(listing))
    change = listing.state.change()
    if change is not None:
        typer.echo(f"{str(change)[0].upper()}{str(change)[1:]}.")


def _replica_report(listing: Listing) -> str:
    """Lines that say which version each replica holds, the candidate last."""
    if not listing.replicas and listing.candidate is None:
        return "No replica says what it holds."
    lines = [f"Replica {replica.replica} holds version {replica.version}." for replica in listing.replicas]
    candidate = listing.candidate
    if candidate is not None:
        name = f"The candidate's replica {candidate.replica}"
        if candidate.error is not None:
            lines.append(f"{name} cannot load version {candidate.failed}: {candidate.error}")
        else:
            lines.append(f"{name} {f'holds version {candidate.version}' if candidate.version else 'starts'}.")
    return "\n".join(lines)


def delete_versions(numbers: list[int], url: str, model: str | None = None) -> None:
    """Deletes versions of a running endpoint, one after the other."""
    from serving.registry.client import EndpointClient

    with EndpointClient(url, timeout_s=TIMEOUT_S, model=model) as client:
        for number in numbers:
            freed_bytes = client.delete(number)
            typer.echo(f"Version {number} is deleted; {freed_bytes / 2**20:.3g} MiB are free again.")


def _candidate_version(client: EndpointClient, checkpoint: str) -> Version:
    """The version to promote: a new copy of a checkpoint, or a version given by its number."""
    path = Path(checkpoint).expanduser()
    if checkpoint.isdecimal() and not path.exists():
        versions = {version.number: version for version in client.listing().versions}
        if int(checkpoint) not in versions:
            raise ServingError(f"{client.url} has no version {checkpoint}; it has {', '.join(map(str, versions))}")
        return versions[int(checkpoint)]
    address = checkpoint if is_url(checkpoint) else str(path.absolute())
    typer.echo(f"The endpoint copies and checks {address} …")
    return client.register(address)


@contextmanager
def _loaded_canary(client: EndpointClient, version: Version, state: State) -> Iterator[None]:
    """Loads a version as a canary without requests, and ends the canary afterwards if it was not promoted. A version
    that is the canary already stays the canary."""
    try:
        if state.canary != version.number:
            typer.echo(f"Loading {_label(version)} beside version {state.current} …")
            client.promote(version.number, canary=0.0)
        yield
    finally:
        new_state = client.listing().state
        if new_state.canary == version.number and not new_state.share:
            client.end_canary()


def _run_gate(config: GateConfig, client: EndpointClient, version: Version, state: State) -> None:
    """Compares a version with the current one, and prints the figures.

    Raises:
        typer.Exit: the version is worse than the gate allows; it is no longer the canary.
    """
    from serving.registry.client import EndpointClient
    from serving.registry.gate import compare, evaluate_versions

    with EndpointClient(client.url, timeout_s=config.timeout_s, model=client.model) as gate_client:
        current, candidate = evaluate_versions(config, gate_client, [state.current, version.number])
    new_state = client.listing().state
    if (new_state.current, new_state.canary) != (state.current, version.number):
        raise ServingError(
            f"the versions of {client.url} were changed meanwhile: version {new_state.current} answers, and the "
            f"canary is {new_state.canary}. The comparison with version {state.current} is void; run the command again"
        )
    result = compare(current, candidate, config.margins)
    typer.echo(result.table(f"version {state.current}", f"version {version.number}"))
    if not result.passes:
        client.end_canary()
        typer.echo(f"{_label(version)} is worse than allowed, and was not promoted.")
        raise typer.Exit(1)


def _switch(client: EndpointClient, version: Version, state: State, canary: float | None, dry_run: bool) -> None:
    if dry_run:
        typer.echo(f"{_label(version)} may be promoted. Nothing was switched.")
        return
    option = "" if client.model is None else f" --model {client.model}"
    typer.echo(f"Switching to {_label(version)} …")
    client.promote(version.number, canary=canary)
    if canary is None:
        typer.echo(
            f"Version {version.number} answers, in place of version {state.current}; `raylign rollback{option}` undoes "
            "it."
        )
    else:
        typer.echo(
            f"Version {version.number} answers {canary:.3g} of the requests. "
            f"`raylign promote {version.number}{option}` gives it all, and `raylign rollback{option}` none."
        )


def _row(version: Version, state: State) -> tuple[str, ...]:
    marks = {state.previous: "previous", state.canary: f"canary {state.share:.3g}", state.current: "current"}
    figures = [f"{name} {version.metrics[key]:.3g}" for key, name in SHOWN_METRICS if key in version.metrics]
    return (
        str(version.number),
        marks.get(version.number, ""),
        version.kind,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created)),
        version.source,
        ", ".join(figures),
    )


def _label(version: Version) -> str:
    return f"version {version.number} ({version.name})"
