"""The command line: `unmerge COMMAND`, one function a command, nothing computed here."""

from __future__ import annotations

import click

from unmerge.cli import analyze, archive, bundle, demo, formats, merge, store, verify, versions


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: unmerge init zoo && unmerge add zoo adapters/* -m 'first import' && "
    "unmerge merge zoo out.rmb --method rmm --set basis_size=3",
)
@click.version_option(package_name="unmerge")
def cli() -> None:
    """Merge LoRA adapters, reversibly.

    Adapters go into a versioned store; a merge writes a bundle; from a reversible bundle every
    adapter comes back.
    """


for module in (store, archive, versions, formats, analyze, merge, bundle, verify, demo):
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Entry point of the `unmerge` script."""
    cli()
