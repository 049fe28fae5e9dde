"""Commands on the versions of a store: log, tag, diff, gc."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from unmerge.cli.options import AT, STORE, some
from unmerge.cli.output import (
    INTERRUPTED,
    command,
    error_text,
    print_json,
    print_table,
    progress_bar,
    say,
    size,
)
from unmerge.errors import ConfigError
from unmerge.store import AdapterChange, AdapterStore, GcReport, ModuleChange, StoreDiff

_AGE = re.compile(r"(\d{1,5})([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24}


@command("unmerge log zoo --limit 10", name="log")
@STORE
@AT
@click.option("--limit", type=click.IntRange(min=1), help="Show this many versions at most.")
def log(store: str, at: str | None, limit: int | None, as_json: bool) -> None:
    """Show the versions of a store, newest first."""
    opened = AdapterStore.open(store, at=at)
    history = opened.history()
    versions = history[:limit]
    shown = {version.id for version in history}
    # What `gc` forgot is no longer between a tagged version and the newest one.
    apart = {name: version for name, version in opened.tags().items() if version not in shown}
    if as_json:
        print_json(
            {
                "store": store,
                "tags_elsewhere": apart,
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
        ("version", "written (UTC)", "tags", "message"),
        [
            (v.id, f"{v.written_at:%Y-%m-%d %H:%M:%S}", ", ".join(v.tags), v.message)
            for v in versions
        ],
    )
    if apart:
        tags = ", ".join(f"{name} ({version})" for name, version in apart.items())
        say(f"not in this history, and readable with --at: {tags}")


@command("unmerge tag zoo v1", name="tag")
@STORE
@click.argument("name", required=False)
@click.option("--at", metavar="VERSION", help="Version to tag; the newest unless given.")
@click.option("--delete", is_flag=True, help="Delete the tag; no other can have its name.")
def tag(store: str, name: str | None, at: str | None, delete: bool, as_json: bool) -> None:
    """Give a version a name that never moves; without a name, list those there are.

    What a tag names stays readable, whatever is removed and collected later.
    """
    if delete and (name is None or at is not None):
        raise ConfigError("--delete takes the name of a tag, and no --at")
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
    if delete:
        opened.delete_tag(name)
        if as_json:
            print_json({"store": store, "tag": name, "deleted": True})
        else:
            say(f"deleted tag {name}")
        return
    opened.tag(name, at)
    version = opened.tags()[name]
    if as_json:
        print_json({"store": store, "tag": name, "version": version})
    else:
        say(f"{name} is version {version}")


@command("unmerge diff zoo v1 v2", name="diff")
@STORE
@click.argument("before")
@click.argument("after", required=False)
@click.option("--brief", is_flag=True, help="Compare no modules, and so read no tensor.")
def diff(store: str, before: str, after: str | None, brief: bool, as_json: bool) -> None:
    """Show what changed from one version to another, or to the newest.

    Adapters that were added, removed or changed, and of those that changed every module that
    differs: the norm of its delta before and after, and the norm of the difference relative to that
    before (Frobenius norms).
    """
    opened = AdapterStore.open(store)
    with progress_bar() as progress:
        found = opened.diff(
            before,
            after,
            modules=not brief,
            progress=lambda done, total: progress("compare", done, total),
        )
    if as_json:
        print_json(_diff_data(store, found))
        return
    say(
        f"{store} from {found.before} to {found.after}: {len(found.added)} added, "
        f"{len(found.removed)} removed, {len(found.changed)} changed, {found.unchanged} unchanged"
    )
    for words, names in (("added", found.added), ("removed", found.removed)):
        if names:
            say(f"{words}: {some(names)}")
    if found.changed:
        print_table(
            ("changed", "what", "modules", "verbatim tensors"),
            [
                (change.name, ", ".join(change.fields), str(len(change.modules)), _verbatim(change))
                for change in found.changed
            ],
        )
    rows = [
        (change.name, path, *_module_row(module))
        for change in found.changed
        for path, module in change.modules.items()
    ]
    if rows:
        print_table(("adapter", "module", "", "norm before", "norm after", "difference"), rows)


@command("unmerge gc zoo --forget-before 30d", name="gc")
@STORE
@click.option(
    "--forget-before",
    metavar="DATE|AGE",
    help="Forget versions written before 2026-01-31 (or 2026-01-31T18:00; UTC), or more than 30d "
    "(12h, 8w) ago.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be forgotten.")
@click.option("--yes", is_flag=True, help="Do not ask before forgetting.")
def gc(store: str, forget_before: str | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Give back the space of what no version needs.

    Alone, only what imports that were killed left behind is deleted (on S3, once it is a day old):
    every version stays. With --forget-before older versions are forgotten first, which cannot be
    undone. The newest version and those with a tag always stay, and so does every adapter in them.
    """
    moment = None if forget_before is None else _moment(forget_before)
    opened = AdapterStore.open(store)
    if moment is not None and not yes:
        planned = opened.gc(forget_before=moment, dry_run=True)
        if planned.forgotten and not dry_run:
            _confirm(planned)
    if dry_run:
        report = opened.gc(forget_before=moment, dry_run=True)
    else:
        try:
            with progress_bar() as progress:
                report = opened.gc(
                    forget_before=moment,
                    progress=lambda done, total: progress("rewrite", done, total),
                )
        except KeyboardInterrupt:
            click.echo(
                "unmerge: interrupted; versions may be forgotten already, those that unmerge log "
                f"{store} shows are whole; run it again to finish",
                err=True,
            )
            sys.exit(INTERRUPTED)
    if as_json:
        print_json(_gc_data(store, report))
    else:
        _say_collected(report)


def _moment(text: str) -> datetime:
    """Return the time that a date or an age means."""
    if age := _AGE.fullmatch(text.strip().lower()):
        return datetime.now(UTC) - timedelta(hours=int(age[1]) * _HOURS[age[2]])
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f'--forget-before takes a date such as 2026-01-31 or an age such as 30d, not "{text}"'
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _confirm(planned: GcReport) -> None:
    """Ask whether versions may be forgotten, or refuse where nobody can answer."""
    count = len(planned.forgotten)
    versions = "1 version" if count == 1 else f"{count} versions"
    if not _somebody_answers():
        raise ConfigError(
            f"{versions} would be forgotten, which cannot be undone; give --yes to do it, "
            "--dry-run to look at them first"
        )
    click.confirm(f"Forget {versions} for ever?", abort=True, err=True)


def _somebody_answers() -> bool:
    return sys.stdin.isatty()


def _say_collected(report: GcReport) -> None:
    if report.dry_run:
        say(f"would forget {len(report.forgotten)} versions: {some(report.forgotten) or 'none'}")
        if report.dropped:
            say(f"would leave out {size(report.dropped.nbytes)} that no adapter uses any more")
        return
    if report.forgotten:
        say(f"forgot {len(report.forgotten)} versions: {some(report.forgotten)}")
    if report.compacted is not None:
        say(
            f"version {report.compacted} has the same adapters without "
            f"{size(report.dropped.nbytes)} that none of them used"
        )
    if not report.objects:
        say("nothing to delete")
        return
    say(f"deleted {report.objects} objects, {size(report.nbytes)}")
    if report.size_before is not None and report.size_after is not None:
        say(f"the store had {size(report.size_before)}, and has {size(report.size_after)}")


def _gc_data(store: str, report: GcReport) -> dict[str, Any]:
    dropped = report.dropped
    return {
        "store": store,
        "dry_run": report.dry_run,
        "forgotten": list(report.forgotten),
        "compacted": report.compacted,
        "dropped": {
            "rows": dropped.rows,
            "records": dropped.records,
            "verbatim": dropped.verbatim,
            "bytes": dropped.nbytes,
        },
        "objects": report.objects,
        "bytes": report.nbytes,
        "size_before": report.size_before,
        "size_after": report.size_after,
    }


def _verbatim(change: AdapterChange) -> str:
    return ", ".join(f"{key} {what}" for key, what in change.verbatim.items())


def _module_row(module: ModuleChange) -> tuple[str, str, str, str]:
    return (
        module.change,
        error_text(module.norm_before),
        error_text(module.norm_after),
        error_text(module.difference),
    )


def _diff_data(store: str, found: StoreDiff) -> dict[str, Any]:
    return {
        "store": store,
        "before": found.before,
        "after": found.after,
        "added": list(found.added),
        "removed": list(found.removed),
        "unchanged": found.unchanged,
        "changed": {
            change.name: {
                "fields": list(change.fields),
                "verbatim": dict(change.verbatim),
                "modules": {
                    path: {
                        "change": module.change,
                        "norm_before": module.norm_before,
                        "norm_after": module.norm_after,
                        "difference": module.difference,
                    }
                    for path, module in change.modules.items()
                },
            }
            for change in found.changed
        },
    }


COMMANDS = (log, tag, diff, gc)
