"""The commands of ``sparsebert`` and their options. Each hands over to a module of its own, loaded when it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sparsebert.cli.common import DTYPES, Rendered, Report, execute, output

T = TypeVar("T")

app = typer.Typer(
    name="sparsebert",
    help="Compress fine-tuned BERT-like encoders, and measure what it costs and gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(
    help="Measure layers and models on a device, dense, packed and as other libraries do it.", no_args_is_help=True
)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or a model id of the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda", help="Where to run; the GPU by default where there is one."),
]

RunFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE.jsonl", help="New file for the rows; by default named by the time."),
]
Budget = Annotated[float, typer.Option("--budget", metavar="SECONDS", min=0.0, help="When to stop measuring.")]


def _parsed(parse: Callable[[str], T], text: str, option: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{option}'") from None


def _one_of(names: tuple[str, ...], text: str | None, option: str) -> None:
    if text is not None and text not in names:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(names)}", param_hint=f"'{option}'")


def _names(text: str | None) -> list[str] | None:
    """``A,B`` as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


def _device(text: str | None) -> str | None:
    if text is not None and re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise typer.BadParameter(f"{text!r} is not a device; it is cpu, cuda or cuda:1", param_hint="'--device'")
    return text


def _run(
    context: typer.Context,
    work: Callable[[Report], dict[str, Any]],
    render: Callable[[dict[str, Any]], Rendered],
    as_json: bool,
) -> None:
    execute(work, render, as_json=as_json, debug=bool(context.obj))


def _version(wanted: bool) -> None:
    if wanted:
        from sparsebert import __version__

        typer.echo(f"sparsebert {__version__}")
        raise typer.Exit


@app.callback()
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = debug


@app.command()
def compress(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to save to, new or empty.")],
    spec: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="SPEC",
            help="Format of all encoder linears: 2:4 keeps 2 of every 4 weights, 2:4@0.5 does so in half of the "
            "columns, bitmap:0.1 keeps a tenth anywhere, low-rank:0.25 (or :r64) factorizes, "
            "low-rank:0.15+rows:0.1 (or +2:4, +bitmap:0.1) adds a sparse part, int8, int8-static, int8+2:4.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHICH=SPEC|dense",
            help="Another format, or none, for a role (query, key, value, attention_output, intermediate, output), a "
            "layer's path or a glob over paths. Repeatable.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Instead of --format: a folder with plan.json, or a JSON file. Its 'layers' say how the weights are "
            "compressed already, which is verified; its 'selection' is compressed in one shot.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Path or glob to leave dense. Repeatable.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="Save in this dtype; by default as it was stored."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="How packed weights are held for the report of memory; the file is the same.")
    ] = "auto",
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For int8-static: .tsv or .csv with texts as the model will meet them."),
    ] = None,
    calibrate_stdlib: Annotated[
        bool,
        typer.Option("--calibrate-stdlib", help="For int8-static: docstrings of Python's library instead of a file."),
    ] = False,
    calibration_method: Annotated[
        str | None,
        typer.Option(metavar="minmax|percentile|mse", help="How large inputs are clipped; by default minmax, not."),
    ] = None,
    text_columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of --calibrate; by default sentence1, and sentence2 if there.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a saved model that is in OUT.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compress a dense model's encoder in one shot, or as a plan says, pack it and save it.

    One-shot compression costs accuracy; `sparsebert eval OUT --compare MODEL ...` tells how much.
    """
    from sparsebert.cli import compress as command
    from sparsebert.cli.calibrate import DEFAULT_METHOD, METHODS, Text
    from sparsebert.configs import parse_config

    every = None if spec is None else _parsed(parse_config, spec, "--format")
    layers = dict(_parsed(command.parse_layer, text, "--layer") for text in layer or ())
    if plan is None and every is None and not layers:
        raise typer.BadParameter("give --format, such as 2:4, --layer or --plan", param_hint="'--format'")
    if plan is not None:
        for option, given in (("--format", spec), ("--layer", layer), ("--ignore", ignore)):
            if given:
                raise typer.BadParameter(f"a plan says it all; it does not go with {option}", param_hint="'--plan'")
    if calibrate is not None and calibrate_stdlib:
        raise typer.BadParameter("give --calibrate FILE or --calibrate-stdlib, not both", param_hint="'--calibrate'")
    if calibration_method is not None and calibrate is None and not calibrate_stdlib:
        raise typer.BadParameter("needs --calibrate FILE or --calibrate-stdlib", param_hint="'--calibration-method'")
    if text_columns is not None and calibrate is None:
        raise typer.BadParameter("needs --calibrate FILE", param_hint="'--text-columns'")
    _one_of(METHODS, calibration_method, "--calibration-method")
    _one_of(DTYPES, dtype, "--dtype")
    _device(device)
    text = None
    if calibrate is not None or calibrate_stdlib:
        text = Text(calibrate, _names(text_columns), calibration_method or DEFAULT_METHOD)
    _run(
        context,
        lambda report: command.compress(
            model,
            out,
            wanted=command.Wanted(every, layers) if plan is None else command.read_plan(plan),
            ignore=ignore or (),
            text=text,
            dtype=dtype,
            layout=layout,
            device=device,
            force=force,
            report=report,
        ),
        command.render,
        as_json,
    )


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    model: Model,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=".tsv (split on tabs, no quoting) or .csv, UTF-8, with a header line."),
    ] = None,
    stdlib: Annotated[
        bool,
        typer.Option("--stdlib", help="Instead of a file: find 500 docstrings of Python's library by their summary."),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="classification|retrieval",
            help="Classification: accuracy, F1, Matthews correlation. Retrieval: MRR@10 and recall@1 of finding the "
            "second text by the first. By default classification, with --stdlib retrieval.",
        ),
    ] = None,
    text_columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="By default sentence1, and sentence2 where there is one.")
    ] = None,
    label_column: Annotated[str, typer.Option(metavar="NAME")] = "label",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(min=3, help="Cut texts at this many tokens; by default the model's limit (--stdlib: 128)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A second model, measured on the same rows.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="Compute in this dtype; by default as it was stored."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a model, dense or compressed: its quality on a whole data set, and its latency."""
    from sparsebert.cli import evaluate as command

    if (data is None) != stdlib:
        raise typer.BadParameter("give either --data FILE or --stdlib", param_hint="'--data'")
    task = task or ("retrieval" if stdlib else "classification")
    _one_of(command.TASKS, task, "--task")
    if stdlib and task != "retrieval":
        raise typer.BadParameter("--stdlib has no labels, its task is retrieval", param_hint="'--task'")
    _one_of(DTYPES, dtype, "--dtype")
    _device(device)
    _run(
        context,
        lambda report: command.evaluate(
            model,
            data=data,
            task=task,
            text_columns=_names(text_columns),
            label_column=label_column,
            batch_size=batch_size,
            max_length=max_length,
            limit=limit,
            compare=compare,
            dtype=dtype,
            device=device,
            report=report,
        ),
        command.render,
        as_json,
    )


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the result goes, new or empty.")],
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="The dense model: a folder or an id of the hub.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME",
            help="A folder with train and dev files (.tsv, .csv or .jsonl), a file of training rows with --dev beside "
            "it, or a data set of the hub as NAME or NAME:CONFIGURATION; by default that of the recipe's task.",
        ),
    ] = None,
    dev: Annotated[Path | None, typer.Option(metavar="FILE", help="The rows to measure on.")] = None,
    text_columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="By default sentence1, and sentence2 where there is one.")
    ] = None,
    label_column: Annotated[str, typer.Option(metavar="NAME")] = "label",
    regression: Annotated[
        bool | None,
        typer.Option("--regression/--classification", help="By default regression where a label is a fraction."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first training rows.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:TASK]|FILE.toml[:TASK]",
            help="Method, target and all settings for a task of GLUE, such as seven:sst2; options given here go first.",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of sparsebert.methods, such as seven.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Format of all encoder linears, written as --format of compress: 2:4."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="WHICH=SPEC|dense", help="Another format, or none, for a role or path. Repeatable."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An argument of the method, such as start=100; 10% is a share of the steps. Repeatable.",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="PATH", help="A fine-tuned model, for methods that learn from one.")
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="For a method that takes no teacher: this share of the loss is the distance from it."
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="How often to see the data; by default the recipe's, or 3.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches to an optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its highest.")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="linear|constant")] = None,
    warmup: Annotated[str | None, typer.Option(metavar="N|N%", help="Steps, or a share of them.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices, not of biases and norms.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradients are clipped to this norm; 0 does not.")] = None,
    max_length: Annotated[int | None, typer.Option(min=3, help="Cut texts at this many tokens.")] = None,
    group_by_length: Annotated[
        bool | None,
        typer.Option("--group-by-length/--any-length", help="Batches of texts of similar length: less padding."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="accuracy|f1|matthews|pearson|spearman",
            help="What is shown while it trains; all are in the result.",
        ),
    ] = None,
    eval_batch_size: Annotated[int, typer.Option(min=1)] = 64,
    eval_every: Annotated[int | None, typer.Option(min=1, metavar="N", help="In steps; by default an epoch.")] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Save a state to resume from every N steps, not only on Ctrl-C."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that was interrupted in --out, as it was set up.")
    ] = False,
    export: Annotated[
        bool, typer.Option("--export/--no-export", help="Pack the result, or leave it with zeros.")
    ] = True,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe (autocast).")] = False,
    seed: Annotated[int, typer.Option(help="Draws batches, dropout and a new head.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a dense model with a compression method, and save it packed.

    Ctrl-C leaves a state to go on from: sparsebert train --resume --out FOLDER.
    """
    from sparsebert.cli import metrics, recipes
    from sparsebert.cli.compress import parse_layer

    _device(device)
    if resume:
        allowed = {"out", "resume", "device", "as_json"}
        given = [
            name.replace("_", "-")
            for name in context.params
            if name not in allowed and str(context.get_parameter_source(name)).endswith("COMMANDLINE")
        ]
        if given:
            raise typer.BadParameter(
                f"goes on with the settings it began with; it does not go with --{given[0]}", param_hint="'--resume'"
            )
    if steps is not None and epochs is not None:
        raise typer.BadParameter("give --steps or --epochs, not both", param_hint="'--steps'")
    _one_of(recipes.SCHEDULES, schedule, "--schedule")
    _one_of((*metrics.CLASSIFICATION, *metrics.REGRESSION), metric, "--metric")
    for text in layer or ():
        _parsed(parse_layer, text, "--layer")
    options = dict(_parsed(recipes.parse_option, text, "--option") for text in option or ())
    # Made here: while a command works, what is printed goes to stderr.
    console = output(to_stderr=as_json)

    def work(report: Report) -> dict[str, Any]:
        from sparsebert.cli import train as command
        from sparsebert.cli.steps import Steps

        settings = None
        if not resume:
            asked = recipes.load(recipe) if recipe is not None else None
            task = None if asked is None else asked.task
            stages = command.settle(
                recipe=asked,
                method=method,
                target=target,
                layers=dict(text.split("=", 1) for text in layer or ()),
                options=options,
                overrides={
                    "epochs": epochs,
                    "steps": steps,
                    "batch_size": batch_size,
                    "accumulate": accumulate,
                    "lr": lr,
                    "schedule": schedule,
                    "warmup": int(warmup) if warmup is not None and warmup.isdecimal() else warmup,
                    "weight_decay": weight_decay,
                    "max_grad_norm": max_grad_norm,
                    "max_length": max_length,
                    "distillation": distillation,
                    "group_by_length": group_by_length,
                },
                teacher=teacher,
            )
            if model is None:
                raise ValueError("give --model, the folder of a dense checkpoint or a model id of the hub")
            if data is None and task is None:
                raise ValueError("give --data, or a recipe with a task, such as seven:sst2")
            on_hub = task is not None and data in (None, task.hub)
            columns = _names(text_columns) or (list(task.hub_columns) if task is not None and on_hub else None)
            settings = command.Settings(
                model=model,
                data=data or (task.hub if task is not None else ""),
                stages=stages,
                dev=None if dev is None else str(dev),
                text_columns=None if columns is None else tuple(columns),
                label_column=label_column,
                regression=regression,
                limit=limit,
                teacher=teacher,
                recipe=recipe,
                metric=metric or (None if task is None else task.metric),
                seed=seed,
                bf16=bf16,
                export=export,
                eval_batch_size=eval_batch_size,
                eval_every=eval_every,
                save_every=save_every,
            )
        return command.train(settings, out, device=device, progress=Steps(console, quiet=False))

    def show(result: dict[str, Any]) -> Rendered:
        from sparsebert.cli import train as command

        return command.render(result)

    _run(context, work, show, as_json)


@app.command()
def info(
    context: typer.Context,
    path: Annotated[str | None, typer.Argument(help="Folder of a checkpoint; without it, this machine.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, read without loading it, or what this machine can run."""
    from sparsebert.cli import info as command

    if path is None:
        _run(context, lambda report: command.machine(), command.render_machine, as_json)
    else:
        _run(context, lambda report: command.inspect(path), command.render, as_json)


@app.command()
def tune(
    context: typer.Context,
    model: Model,
    tokens: Annotated[
        str,
        typer.Option(metavar="N,N", help="Token counts (batch times length) to measure at, such as 128,4096."),
    ],
    fuse: Annotated[
        bool, typer.Option("--fuse", help="As sb.fuse_ runs it: query, key and value as one, LayerNorms with linears.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a packed model's layers here, so that each is held in the layout that is fastest."""
    from sparsebert.cli import tune as command

    counts = _parsed(command.parse_tokens, tokens, "--tokens")
    _device(device)
    _run(
        context,
        lambda report: command.tune(model, counts, fuse=fuse, device=device, report=report),
        command.render,
        as_json,
    )


@bench.command("ops")
def bench_ops(
    context: typer.Context,
    shapes: Annotated[
        str, typer.Option(metavar="base,large,minilm", help="The layers of which models of the BERT family.")
    ] = "base",
    tokens: Annotated[
        str | None, typer.Option(metavar="N,N", help="Token counts (batch times length), such as 1,128,4096.")
    ] = None,
    peers: Annotated[
        str | None, typer.Option(metavar="GLOB,GLOB", help="Only peers so named, such as 'cublas_*,2:4/*'.")
    ] = None,
    device: Device = None,
    out: RunFile = None,
    budget: Budget = 600.0,
    as_json: Json = False,
) -> None:
    """Measure single linear layers: dense, every format and kernel here, and other libraries' kernels."""
    from sparsebert.cli import bench as command

    names = _parsed(command.parse_shapes, shapes, "--shapes")
    counts = None if tokens is None else _parsed(command.parse_counts, tokens, "--tokens")
    _device(device)
    _run(
        context,
        lambda report: command.ops(
            shapes=names,
            tokens=counts,
            peers=_names(peers),
            device=device,
            out=out,
            budget_s=budget,
            report=report,
        ),
        command.render,
        as_json,
    )


@bench.command("model")
def bench_model(
    context: typer.Context,
    models: Annotated[str, typer.Option(metavar="A,B", help="base, large, minilm.")] = "base",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences a call.")] = "1,8,32",
    length: Annotated[str, typer.Option(metavar="N,N", help="Tokens a sequence.")] = "128",
    rungs: Annotated[
        str | None, typer.Option(metavar="A,B", help="These rungs, such as graph_fp16,graph_2:4, not the usual ones.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="Whether to measure torch.compile, which takes minutes.")
    ] = True,
    device: Device = None,
    out: RunFile = None,
    budget: Budget = 600.0,
    as_json: Json = False,
) -> None:
    """Measure whole models end to end: eager, compiled, in a CUDA graph, quantized, and in every format."""
    from sparsebert.cli import bench as command

    batches = _parsed(command.parse_counts, batch, "--batch")
    lengths = _parsed(command.parse_counts, length, "--length")
    _device(device)
    _run(
        context,
        lambda report: command.model(
            models=_names(models) or [],
            batches=batches,
            lengths=lengths,
            rungs=_names(rungs),
            compiled=compiled,
            device=device,
            out=out,
            budget_s=budget,
            report=report,
        ),
        command.render,
        as_json,
    )


@bench.command("report")
def bench_report(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="FILE.jsonl...", help="Runs, of one device or of several.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write report.md and the plots.")],
    plots: Annotated[bool, typer.Option("--plots", help="Draw them too, as SVG and PNG.")] = False,
    as_json: Json = False,
) -> None:
    """Make tables and plots of runs: speed-ups, break-even points, rooflines, models end to end."""
    from sparsebert.cli import bench as command

    _run(
        context,
        lambda report: command.report(paths, out, plots=plots, progress=report),
        command.render_report,
        as_json,
    )


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write; by default demo-output.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Distillation steps; by default as many as take about two minutes on two cores."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the training batches; by default 0.")] = None,
    all_formats: Annotated[
        bool,
        typer.Option("--all-formats", help="Instead: every format in one shot, without training, in one table."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a real model through everything on the CPU: prune, recover, pack, save, reload, compare."""
    for option, given in (("--steps", steps), ("--seed", seed)):
        if all_formats and given is not None:
            raise typer.BadParameter(f"trains nothing, so there is no {option}", param_hint="'--all-formats'")
    # Made here: while a command works, what is printed goes to stderr.
    console = output(to_stderr=as_json)

    def work(report: Report) -> dict[str, Any]:
        from sparsebert.cli import demo as command

        place = out or command.DEFAULT_OUT
        if all_formats:
            from sparsebert.cli.all_formats import run_all_formats

            return run_all_formats(out=place, console=console, quiet=False)
        return command.run_demo(
            out=place,
            steps=steps or command.DEFAULT_STEPS,
            seed=seed or 0,
            console=console,
            quiet=False,
        )

    # It prints its table itself, on the way.
    _run(context, work, lambda result: (), as_json)
