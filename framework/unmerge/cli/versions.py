"""Commands on the versions of a store: log, tag."""

from __future__ import annotations

import click

from unmerge.cli.options import AT, STORE
from unmerge.cli.output import command, print_json, print_table, say
from unmerge.errors import ConfigError
from unmerge.store import AdapterStore


@command("unmerge log zoo --limit 10", name="log")
@STORE
@AT
@click.option("--limit", type=click.IntRange(min=1), help="Show this many versions at most.")
def log(store: str, at: str | None, limit: int | None, as_json: bool) -> None:
    """Show the versions of a store, newest first."""
    versions = AdapterStore.open(store, at=at).history()[:limit]
    if as_json:
        print_json(
            {
                "store": store,
                "versions": [
                    {
                        "id": v.id,
                        "parent": v.parent,
                        "message": v.message,
                        "written_at": v.written_at.isoformat(),
                        "tags": list(v.tags),
                    }
                    for v in versions
                ],
            }
        )
        return
    print_table(
        ("version", "written", "tags", "message"),
        [
            (v.id, f"{v.written_at:%Y-%m-%d %H:%M:%S}", ", ".join(v.tags), v.message)
            for v in versions
        ],
    )


@command("unmerge tag zoo v1", name="tag")
@STORE
@click.argument("name", required=False)
@click.option("--at", metavar="VERSION", help="Version to tag; the newest unless given.")
def tag(store: str, name: str | None, at: str | None, as_json: bool) -> None:
    """Give a version a name that never moves; without a name, list those there are.

    What a tag names stays readable, whatever is removed and collected later.
    """
    opened = AdapterStore.open(store)
    if name is None:
        if at is not None:
            raise ConfigError("--at says which version to tag; give the tag's name too")
        tags = opened.tags()
        if as_json:
            print_json({"store": store, "tags": tags})
        else:
            print_table(("tag", "version"), list(tags.items()))
        return
    opened.tag(name, at)
    version = opened.tags()[name]
    if as_json:
        print_json({"store": store, "tag": name, "version": version})
    else:
        say(f"{name} is version {version}")


COMMANDS = (log, tag)
