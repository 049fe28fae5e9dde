"""The command that says which adapter formats there are."""

from __future__ import annotations

import inspect

import click

from unmerge.cli.output import command, print_json, print_table, say, type_text
from unmerge.exporting import writable
from unmerge.formats import FormatRegistration, default_formats


@command("unmerge formats checkpoint", name="formats")
@click.argument("name", required=False)
def formats(name: str | None, as_json: bool) -> None:
    """List the registered adapter formats, or the options of one.

    `add` recognises the format; its --format forces one, and --set gives its options.
    """
    known = default_formats()
    if name is not None:
        _show(name, known[name], as_json)
        return
    if as_json:
        print_json(
            {"formats": [_data(found, registration) for found, registration in known.items()]}
        )
        return
    print_table(
        ("format", "written", "from", "recognised by"),
        [
            (
                found,
                "yes" if writable(registration.format) else "no",
                registration.distribution,
                registration.format.looks_for,
            )
            for found, registration in known.items()
        ],
    )


def _show(name: str, registration: FormatRegistration, as_json: bool) -> None:
    chosen = registration.format
    if as_json:
        print_json({**_data(name, registration), "schema": chosen.model_json_schema()})
        return
    can = "read and written" if writable(chosen) else "only read"
    say(f"{name} (from {registration.distribution}): can be {can}")
    say(f"recognised by {chosen.looks_for}\n")
    say(inspect.getdoc(chosen) or "")
    if not chosen.model_fields:
        say("\nno options")
        return
    print_table(
        ("option", "type", "default", "description"),
        [
            (
                field,
                type_text(info.annotation),
                str(info.get_default(call_default_factory=True)),
                info.description or "",
            )
            for field, info in chosen.model_fields.items()
        ],
    )


def _data(name: str, registration: FormatRegistration) -> dict[str, object]:
    return {
        "format": name,
        "distribution": registration.distribution,
        "looks_for": registration.format.looks_for,
        "written": writable(registration.format),
    }


COMMANDS = (formats,)
