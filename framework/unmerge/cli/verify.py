"""The command that checks whether what was written is still all there, in a bundle or a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import click

import unmerge_bundle
from unmerge.arrays import to_numpy
from unmerge.cli.output import command, print_json, printable, progress_bar, say, size
from unmerge.errors import ConfigError
from unmerge.store import AdapterStore
from unmerge_bundle import Depth, VerifyReport


@command("unmerge verify out.rmb --depth reconstruction --store zoo", name="verify")
@click.argument("path")
@click.option(
    "--depth",
    type=click.Choice(["structure", "digests", "reconstruction"]),
    help="How far to look into a bundle: files and sizes; all bytes; every adapter restored. "
    "Default: digests, with --store reconstruction.",
)
@click.option(
    "--store",
    help="Compare every source's digest, and every restored adapter, with this store's originals.",
)
@click.option("--at", metavar="VERSION", help="Version id or tag of the store.")
def verify(path: str, depth: str | None, store: str | None, at: str | None, as_json: bool) -> None:
    """Check a bundle or a store; exits 1 when anything is wrong.

    Of a store every bit of one version is read: the newest, or that of --at. Of a bundle, with
    --store, originals are compared too: the digest of every source, and the recorded errors of
    every adapter that comes back.
    """
    if _is_store(path):
        if depth is not None or store is not None:
            raise ConfigError(f"{path} is a store; --depth and --store are for bundles")
        _verify_store(path, at, as_json)
    else:
        if at is not None and store is None:
            raise ConfigError("--at is a version of a store; give --store too")
        _verify_bundle(Path(path), depth, store, at, as_json)


def _is_store(path: str) -> bool:
    """Return whether `path` is where a store is, whole or damaged; bundles are local."""
    # The one is in every repository of Icechunk, the other in every bundle.
    inside = Path(path) / "snapshots"
    return path.startswith("s3://") or (
        inside.is_dir() and not inside.with_name("bundle.json").exists()
    )


def _verify_store(address: str, at: str | None, as_json: bool) -> None:
    opened = AdapterStore.open(address, at=at)
    with progress_bar() as progress:
        report = opened.verify(progress=lambda done, total: progress("verify", done, total))
    if as_json:
        print_json(
            {
                "store": address,
                "version": report.version,
                "ok": report.ok,
                "adapters": report.adapters,
                "bytes": report.nbytes,
                "unused": None
                if report.dead is None
                else {
                    "rows": report.dead.rows,
                    "records": report.dead.records,
                    "verbatim": report.dead.verbatim,
                    "bytes": report.dead.nbytes,
                },
                "problems": [
                    {
                        "adapters": list(problem.adapters),
                        "module": problem.module,
                        "factor": problem.factor,
                        "message": problem.message,
                    }
                    for problem in report.problems
                ],
            }
        )
    elif report.ok:
        say(
            f"{address} at {report.version}: sound: {report.adapters} adapters, every bit of "
            f"{size(report.nbytes)} of tensors read"
        )
        if report.dead:
            say(f"note: {size(report.dead.nbytes)} are of no adapter any more; see unmerge gc")
    else:
        for problem in report.problems:
            click.echo(f"unmerge: {printable(problem.message)}", err=True)
        whole, harmed = report.adapters, {n for p in report.problems for n in p.adapters}
        click.echo(
            f"unmerge: {address} at {report.version}: {len(report.problems)} problems; "
            f"{len(harmed)} adapters are damaged, {whole} are whole",
            err=True,
        )
    if not report.ok:
        sys.exit(1)


def _verify_bundle(
    bundle: Path, depth: str | None, store: str | None, at: str | None, as_json: bool
) -> None:
    depth = depth or ("digests" if store is None else "reconstruction")
    originals, digests = None, None
    if store is not None:
        opened = AdapterStore.open(store, at=at)
        digests = {info.name: info.digest for info in opened.list()}
        originals = _originals(opened) if depth == "reconstruction" else None
    report = unmerge_bundle.verify(bundle, cast(Depth, depth), originals, digests)
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "depth": depth,
                "ok": report.ok,
                "blobs": report.blobs,
                "sources_compared": report.sources,
                "adapters_restored": report.adapters,
                "adapters_compared": report.compared,
                "problems": [
                    {"code": p.code, "path": p.path, "message": p.message} for p in report.problems
                ],
            }
        )
    elif report.ok:
        say(f"{bundle}: sound ({depth}): {_checked(report)}")
    else:
        for problem in report.problems:
            text = f"{problem.code}: {problem.path}: {problem.message}"
            click.echo(f"unmerge: {printable(text)}", err=True)
    if not report.ok:
        sys.exit(1)


def _checked(report: VerifyReport) -> str:
    """Return what was looked at, so that nothing that was not seems to have been."""
    counts = (
        (report.blobs, "blobs read"),
        (report.adapters, "adapters restored"),
        (report.sources, "sources' digests compared with the store"),
        (report.compared, "adapters compared with their originals"),
    )
    return ", ".join(f"{count} {what}" for count, what in counts if count)


def _originals(store: AdapterStore) -> Callable[[str], Mapping[str, tuple[Any, Any]]]:
    def read(name: str) -> Mapping[str, tuple[Any, Any]]:
        adapter = store.read_adapter(name)
        return {path: (to_numpy(f.A), to_numpy(f.B)) for path, f in adapter.modules.items()}

    return read


COMMANDS = (verify,)
