"""The command line: `holdfast serve | work | migrate | verify | errors | token | demo | sandbox-provider`."""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module
from importlib.metadata import version as distribution_version
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from holdfast import observe
from holdfast.audit import Report, audit
from holdfast.bootstrap import HISTORIES, migrate_all
from holdfast.clock import SystemClock
from holdfast.db.connect import connect
from holdfast.db.migrate import require_current
from holdfast.edge import errors_cli, queues_cli
from holdfast.edge.report import show
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.settings import Secret, Settings, load

EXIT_FINDINGS = 1
EXIT_CANNOT = 2

app = typer.Typer(
    name="holdfast",
    help="Sells limited stock without losing an order, a unit or a cent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(errors_cli.app)
app.add_typer(queues_cli.app)


def main() -> None:
    """The entry point: errors of ours end with a sentence and status 2, not with a traceback."""
    try:
        app()
    except HoldfastError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error.detail}", markup=False)
        sys.exit(EXIT_CANNOT)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; wins over HOLDFAST_HTTP__HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port, 0 for a free one; wins over HOLDFAST_HTTP__PORT.")
    ] = None,
    work: Annotated[bool, typer.Option(help="Run the workers in this process too.")] = True,
) -> None:
    """Serve the HTTP API (and the workers, unless --no-work)."""
    settings = _settings()
    http = settings.http
    http = msgspec.structs.replace(http, host=host or http.host, port=http.port if port is None else port)
    settings = msgspec.structs.replace(settings, http=http)
    server = _server()

    def ready(url: str) -> None:
        typer.echo(f"holdfast listens on {url}")

    raise typer.Exit(server.run(lambda: server.serve(settings, work=work, on_ready=ready)))


@app.command()
def work() -> None:
    """Run the workers only (needs PostgreSQL when an API runs beside it)."""
    settings = _settings()
    server = _server()
    raise typer.Exit(server.run(lambda: server.work(settings, lambda: typer.echo("holdfast works"))))


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema; safe to run twice and from two processes at once."""
    moved = asyncio.run(migrate_all(_settings()))
    for room, (before, after) in moved.items():
        typer.echo(f"{room}: {before or 'empty'} -> {after}" if before != after else f"{room}: {after}, nothing to do")


@app.command()
def verify(
    slack_ms: Annotated[
        int, typer.Option(min=0, max=86_400_000, help="How late the machinery may be before it is a finding.")
    ] = 60_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Audit the live database, read-only; ends with status 1 and the offending rows if something is wrong."""
    report = asyncio.run(_audit(_settings(), slack_ms))
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)).decode())
    else:
        show(report, Console())
    raise typer.Exit(0 if report.clean else EXIT_FINDINGS)


@app.command()
def token(
    subject: Annotated[str, typer.Argument(help="Whose token it is: a buyer's or an employee's name.")],
    staff: Annotated[bool, typer.Option(help="With every scope.")] = False,
    scope: Annotated[list[str] | None, typer.Option(help="With this scope, e.g. stock:write; may be repeated.")] = None,
    valid_s: Annotated[int, typer.Option(min=1, max=366 * 86_400, help="Seconds until it expires.")] = 86_400,
) -> None:
    """Print a bearer token signed with HOLDFAST_HTTP__TOKEN_SECRET."""
    auth = _extra("holdfast.edge.http.auth")
    tokens = auth.Tokens(_settings().http.token_secret.reveal(), SystemClock())
    wanted = frozenset(auth.SCOPES) if staff else frozenset(scope or ())
    if unknown := sorted(wanted - set(auth.SCOPES)):
        raise InvalidInput(f"there is no scope {unknown[0]!r}; there are: {', '.join(auth.SCOPES)}")
    typer.echo(tokens.issue(subject, wanted, valid_s))


@app.command()
def demo(
    buyers: Annotated[int, typer.Option(min=1, max=5_000, help="How many come.")] = 300,
    skus: Annotated[int, typer.Option(min=1, max=200, help="How many SKUs are on sale.")] = 20,
    units: Annotated[int, typer.Option(min=1, max=1_000, help="Units of each SKU.")] = 10,
    seed: Annotated[int, typer.Option(help="Who does what; the same seed gives the same crowd.")] = 1,
) -> None:
    """A sale over real HTTP on a throw-away SQLite file, with a live table and an audit at the end."""
    shop = _extra("holdfast.edge.demo")
    raise typer.Exit(shop.run(shop.Plan(buyers=buyers, skus=skus, units=units, seed=seed)))


@app.command("sandbox-provider")
def sandbox_provider(
    notify_url: Annotated[str, typer.Option(help="Where notices go, e.g. http://127.0.0.1:8000/v1/notices/sandbox.")],
    host: Annotated[str, typer.Option(help="Address to listen on; strangers must not reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port, 0 for a free one.")] = 8_100,
    secret: Annotated[
        str | None, typer.Option(help="Shared with the shop; HOLDFAST_PAYMENTS__SANDBOX_SECRET if left out.")
    ] = None,
    merchant: Annotated[
        str | None, typer.Option(help="Whose provider it is; HOLDFAST_PAYMENTS__MERCHANT_ID if left out.")
    ] = None,
    book: Annotated[str, typer.Option(help="URL of its own SQLite file; in memory if left out.")] = "sqlite://",
) -> None:
    """Run the sandbox payment provider as a server of its own, with faults on request; never for a real sale."""
    settings = _settings()
    provider = _extra("holdfast.edge.sandbox_provider")
    given = provider.Given(
        secret=settings.payments.sandbox_secret if secret is None else Secret(secret),
        merchant_id=merchant or settings.payments.merchant_id,
        notify_url=notify_url,
        book_url=book,
    )
    http = msgspec.structs.replace(settings.http, host=host, port=port)

    def ready(url: str) -> None:
        typer.echo(f"the sandbox provider listens on {url}")

    raise typer.Exit(_server().run(lambda: provider.serve(http, given, ready)))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(distribution_version("holdfast"))


async def _audit(settings: Settings, slack_ms: int) -> Report:
    database = await connect(settings.database, read_only=True)
    try:
        await require_current(database, HISTORIES)
        return await audit(database, SystemClock(), slack_ms)
    finally:
        await database.close()


def _settings() -> Settings:
    settings = load()
    observe.configure_logs(settings.log.format, settings.log.level)
    return settings


def _server() -> Any:
    return _extra("holdfast.edge.server")


def _extra(module: str) -> Any:
    """A part that needs the libraries of the `server` extra; the toolkit's own commands do without them."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("holdfast"):
            raise
        raise InvalidInput(f"this command needs {error.name}; pip install 'holdfast[server]'") from error
