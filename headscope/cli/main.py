"""`headscope`: the command line's entry point. Commands are imported when the program starts, the libraries behind them when one runs."""

from __future__ import annotations

import sys

import typer

from headscope.cli import (
    app_cmd,
    bench_cmd,
    compare_cmd,
    demo_cmd,
    doctor_cmd,
    export_cmd,
    formats_cmd,
    import_cmd,
    intervene_cmd,
    models_cmd,
    plan_cmd,
    probes_cmd,
    profile_cmd,
    run_cmd,
    score_cmd,
    show_cmd,
)
from headscope.errors import HeadscopeError

app = typer.Typer(
    name="headscope",
    help="See what every attention head of a transformer does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure headscope against its peers, as ratios within one run.", no_args_is_help=True)

app.command("demo")(demo_cmd.demo)
app.command("profile")(profile_cmd.profile)
app.command("show")(show_cmd.show)
app.command("score")(score_cmd.score)
app.command("compare")(compare_cmd.compare)
app.command("intervene")(intervene_cmd.intervene)
app.command("plan")(plan_cmd.plan)
app.command("export")(export_cmd.export)
app.command("import")(import_cmd.import_file)
app.command("formats")(formats_cmd.formats)
app.command("run")(run_cmd.run)
app.command("models")(models_cmd.models)
app.command("probes")(probes_cmd.probes)
app.command("app")(app_cmd.serve)
app.command("doctor")(doctor_cmd.doctor)
bench.command("capture")(bench_cmd.capture)
bench.command("probes")(bench_cmd.probes)
bench.command("maps")(bench_cmd.maps)
bench.command("quality")(bench_cmd.quality)
bench.command("interventions")(bench_cmd.interventions)
bench.command("effects")(bench_cmd.effects)
bench.command("prefill")(bench_cmd.prefill)
bench.command("decode")(bench_cmd.decode)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """See what every attention head of a transformer does."""
    if version:
        from headscope import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line; an error that headscope knows becomes one line on stderr and exit code 1."""
    try:
        app()
    except HeadscopeError as error:
        fail(str(error), type(error).__name__)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()
            sys.exit(141)
        fail(f"{error.filename or 'the system'}: {error.strerror or error}; check the path, its permissions and the space there", "OSError")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing half-written was kept\n")
        sys.exit(130)


def fail(message: str, kind: str) -> None:
    """Ends the program with exit code 1: the message as one line on stderr, and as JSON on stdout when --json was given."""
    line = " ".join(message.split())
    if "--json" in sys.argv:
        from headscope.cli.console import emit_json

        emit_json({"error": {"kind": kind, "message": line}})
    sys.stderr.write(f"headscope: {line}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
