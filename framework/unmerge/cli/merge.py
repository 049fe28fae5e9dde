"""Commands that merge: methods, plan, merge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from unmerge.cli.output import (
    command,
    error_text,
    fact_lines,
    mean_error,
    print_json,
    print_table,
    progress_bar,
    ratio,
    say,
    size,
    type_text,
)
from unmerge.errors import ConfigError, IncompatibleAdaptersError
from unmerge.merger import ReversibleMerger
from unmerge.pipeline import MergePipeline, RunReport
from unmerge.plan import Plan
from unmerge.recipe import Recipe, parse_yaml
from unmerge.registry import default_registry
from unmerge.store import AdapterStore

# Rounding to float16 costs about 5e-4, to bfloat16 4e-3; beyond this, entries underflow.
_LARGE_ROUNDING = 1e-2


@command("unmerge methods rmm", name="methods")
@click.argument("name", required=False)
def methods(name: str | None, as_json: bool) -> None:
    """List the registered strategies, or the fields of one."""
    registry = default_registry()
    if name is not None:
        merger = registry.merger_type(name)
        schema = merger.model_json_schema()
        if as_json:
            print_json(
                {
                    "method": name,
                    "version": merger.version,
                    "distribution": registry[name].distribution,
                    "schema": schema,
                }
            )
            return
        say(f"{name} (version {merger.version}, from {registry[name].distribution})\n")
        say(inspect.getdoc(merger) or "")
        print_table(
            ("field", "type", "default", "description"),
            [
                (
                    field,
                    type_text(info.annotation),
                    "required" if info.is_required() else str(info.get_default()),
                    info.description or "",
                )
                for field, info in merger.model_fields.items()
            ],
        )
        return
    rows = []
    for method, registration in registry.items():
        summary = (inspect.getdoc(registration.merger) or "").split("\n\n")[0]
        reversible = issubclass(registration.merger, ReversibleMerger)
        gives = "every adapter" if reversible else "one result"
        rows.append((method, gives, registration.distribution, " ".join(summary.split())))
    if as_json:
        print_json(
            {
                "methods": [
                    {
                        "method": method,
                        "reversible": gives == "every adapter",
                        "distribution": distribution,
                        "summary": summary,
                    }
                    for method, gives, distribution, summary in rows
                ]
            }
        )
        return
    print_table(("method", "gives back", "from", "what it does"), rows)


def _pipeline_options(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--method", metavar="NAME", help="Strategy; see `unmerge methods`."),
        click.option(
            "--set",
            "fields",
            metavar="FIELD=VALUE",
            multiple=True,
            help="A field of the strategy, dotted for nested ones: --set inner.method=average.",
        ),
        click.option(
            "--recipe",
            "recipe_file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="A YAML or JSON recipe, instead of --method and --set.",
        ),
        click.option("--at", metavar="VERSION", help="Version id or tag of the store to read."),
        click.option("--adapters", metavar="A,B,…", help="Adapters to merge; all unless given."),
        click.option(
            "--modules", metavar="GLOB", multiple=True, help="Modules to merge; all unless given."
        ),
        click.option(
            "--weights",
            metavar="A=1,B=0.5",
            help="Weight per adapter, 1 where not given; replaces a recipe's weights.",
        ),
        click.option("--seed", type=click.IntRange(min=0), help="Key of all randomness."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float16", "bfloat16"]),
            help="Dtype of stored tensors; the widest input dtype unless given.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
        click.option(
            "--memory-budget", metavar="BYTES", help="Most memory a chunk takes, such as 2GB."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command("unmerge plan zoo --method rmm --set basis_size=3", name="plan")
@click.argument("store")
@_pipeline_options
def plan(store: str, as_json: bool, **options: Any) -> None:
    """Say what a merge would do, without reading a tensor."""
    made = _pipeline(store, options).plan()
    if as_json:
        print_json(_plan_data(made))
    else:
        _print_plan(made)
    if made.refusals:
        raise IncompatibleAdaptersError("this merge would be refused: " + "; ".join(made.refusals))


@command(
    "unmerge merge zoo out.rmb --method mm_svd --set rank=16 --set inner.method=average",
    name="merge",
)
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@_pipeline_options
@click.option("-m", "--message", default="", help="Free text kept with the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
def merge(
    store: str, out: Path, message: str, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Merge adapters of a store into a bundle."""
    pipeline = _pipeline(store, options)
    with progress_bar() as progress:
        report = pipeline.run(out, overwrite=overwrite, message=message, progress=progress)
    if as_json:
        print_json(_report_data(report))
        return
    for warning in report.plan.warnings:
        say(f"note: {warning}")
    say(
        f"wrote {out}: {len(report.plan.adapters)} adapters, {len(report.plan.modules)} modules, "
        f"{size(report.total_bytes)} with manifest and verbatim tensors; tensors of the merge are "
        f"{_kept(report.element_ratio, report.byte_ratio)}"
    )
    if any(weight != 1 for weight in report.plan.context.weights.values()):
        say(f"weights: {_weighted(report.plan)}")
    for line in fact_lines(list(report.facts.values())):
        say(line)
    for line in doubts(report):
        say(f"note: {line}")
    if report.errors:
        print_table(
            ("adapter", "error of the delta: mean", "largest", "error of the factors: mean"),
            [
                (
                    name,
                    error_text(fmean([e.delta for e in errors.values()])),
                    error_text(max(e.delta for e in errors.values())),
                    mean_error([e.factors for e in errors.values()]),
                )
                for name, errors in sorted(report.errors.items())
            ],
            title="relative reconstruction error over the modules",
        )
        name = report.plan.adapters[0]
        say(f"next: unmerge restore {out} {name} restored/{name}")
        return
    if report.rounding > 0:
        say(
            f"rounding to {report.plan.store_dtype} changed the merged delta by "
            f"{error_text(report.rounding)} at most (relative, largest module)"
        )
    if report.rounding > _LARGE_ROUNDING:
        say("note: that is much; --dtype float32 avoids it")
    if report.full_rank:
        largest = max(rank for shape in report.plan.modules for rank in shape.ranks)
        say(f"next: unmerge export {out} merged/ --rank {largest}  (the result has full rank)")
    else:
        say(f"next: unmerge export {out} merged/")


def _pipeline(store: str, options: dict[str, Any]) -> MergePipeline:
    recipe = _recipe(options)
    budget = options["memory_budget"]
    return MergePipeline.from_recipe(
        AdapterStore.open(store, at=options["at"]),
        recipe,
        device=options["device"],
        memory_budget=None if budget is None else _bytes(budget),
    )


def _recipe(options: dict[str, Any]) -> Recipe:
    given = {
        "adapters": _names(options["adapters"]),
        "modules": list(options["modules"]) or None,
        "weights": _weights(options["weights"]),
        "seed": options["seed"],
        "dtype": options["dtype"],
    }
    given = {key: value for key, value in given.items() if value is not None}
    if options["recipe_file"] is not None:
        if options["method"] is not None or options["fields"]:
            raise ConfigError("--recipe already names a strategy; leave out --method and --set")
        return Recipe.from_data({**Recipe.load(options["recipe_file"]).to_data(), **given})
    if options["method"] is None:
        raise ConfigError("give --method NAME or --recipe FILE; `unmerge methods` lists the names")
    merger: dict[str, Any] = {"method": options["method"]}
    for assignment in options["fields"]:
        _assign(merger, assignment)
    try:
        return Recipe.from_data({"merger": merger, **given})
    except ConfigError as error:
        problem = str(error).removeprefix("recipe: ")
        hint = f"; `unmerge methods {options['method']}` shows the fields"
        outer = problem.startswith("merger") and not problem.startswith("merger.inner.")
        raise ConfigError(problem + (hint if outer else "")) from error


def _assign(merger: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise ConfigError(f'--set takes FIELD=VALUE, not "{assignment}"')
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {assignment}: {error}") from error
    *parents, last = key.split(".")
    target = merger
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {assignment}: {parent} already has a value of its own")
    if key == "method":
        raise ConfigError("--set cannot change the strategy; name it with --method")
    if last in target:
        raise ConfigError(f"--set {key} is given twice")
    target[last] = value


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, separator, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise ConfigError(f'--weights takes NAME=NUMBER, comma-separated, not "{part}"')
        if name in weights:
            raise ConfigError(f'--weights gives "{name}" twice')
        weights[name] = number
    return weights


def _bytes(text: str) -> int:
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        return int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f'--memory-budget takes a size such as 2GB, not "{text}"') from None


def _plan_data(made: Plan) -> dict[str, Any]:
    return {
        "adapters": list(made.adapters),
        "modules": len(made.modules),
        "chunks": [
            {"modules": list(chunk.paths), "peak_bytes": chunk.peak_bytes} for chunk in made.chunks
        ],
        "store_dtype": made.store_dtype,
        "input_elements": made.input_elements,
        "input_bytes": made.input_bytes,
        "output_elements": None if made.output is None else made.output.total,
        "output_packed_bytes": None if made.output is None else made.output.packed_bytes,
        "output_at_most": None if made.output is None else made.output.at_most,
        "output_bytes": made.output_bytes,
        "verbatim_bytes": made.verbatim_bytes,
        "element_ratio": made.element_ratio,
        "byte_ratio": made.byte_ratio,
        "peak_bytes": made.peak_bytes,
        "absent": {name: list(paths) for name, paths in made.absent.items()},
        "unmerged": {name: list(keys) for name, keys in made.unmerged.items()},
        "refusals": list(made.refusals),
        "warnings": list(made.warnings),
    }


def _print_plan(made: Plan) -> None:
    predicted = "unknown before it runs"
    if made.output_bytes is not None:
        predicted = (
            f"{size(made.output_bytes)} in {made.store_dtype}, "
            f"{_kept(made.element_ratio, made.byte_ratio)}"
        )
    say(f"adapters   {len(made.adapters)}: {_weighted(made)}")
    say(f"modules    {len(made.modules)} in {len(made.chunks)} chunks")
    say(f"reads      {size(made.input_bytes)} of factors")
    say(f"writes     {'at most ' if made.output and made.output.at_most else ''}{predicted}")
    if made.verbatim_bytes:
        say(f"           and {size(made.verbatim_bytes)} of verbatim tensors")
    say(f"memory     {size(made.peak_bytes)} at most per chunk")
    for warning in made.warnings:
        say(f"note       {warning}")


def _report_data(report: RunReport) -> dict[str, Any]:
    return {
        "bundle": str(report.path),
        "elements": report.elements,
        "bytes": report.nbytes,
        "total_bytes": report.total_bytes,
        "element_ratio": report.element_ratio,
        "byte_ratio": report.byte_ratio,
        "facts": {path: dict(facts) for path, facts in sorted(report.facts.items())},
        "rounding": report.rounding,
        "plan": _plan_data(report.plan),
        "errors": {
            name: {path: {"factors": e.factors, "delta": e.delta} for path, e in errors.items()}
            for name, errors in sorted(report.errors.items())
        },
    }


def _kept(elements: float | None, nbytes: float | None) -> str:
    """Return what is kept, relative to the adapters: elements where they mean anything, bytes."""
    parts = [] if elements is None else [f"{ratio(elements)} of the adapters' elements"]
    whose = "their" if parts else "the adapters'"
    return ", ".join([*parts, f"{ratio(nbytes)} of {whose} bytes"])


def doubts(report: RunReport) -> list[str]:
    """Return what a user should look at once the merge is done, one line each."""
    lines = []
    started = [facts["converged"] for facts in report.facts.values() if "converged" in facts]
    if stopped := started.count(0):
        lines.append(
            f"{stopped} of {len(started)} modules had not converged when their iterations ended; "
            "raise max_iterations or tolerance"
        )
    if report.errors and report.plan.byte_ratio is None and report.byte_ratio >= 1:
        lines.append(
            f"the bundle holds {ratio(report.byte_ratio)} of the adapters' bytes: it saves nothing"
        )
    worse = [
        name
        for name, errors in sorted(report.errors.items())
        if fmean([e.delta for e in errors.values()]) >= 1
    ]
    if worse:
        lines.append(
            f"{', '.join(worse)}: the error is 1 or more, so that no adapter at all would be nearer"
        )
    return lines


def _weighted(made: Plan) -> str:
    """Return the adapters, with their weights where one of them is not 1."""
    weights = made.context.weights
    if all(weight == 1 for weight in weights.values()):
        return ", ".join(weights)
    return ", ".join(f"{name}={weight:g}" for name, weight in weights.items())


COMMANDS = (methods, plan, merge)
