"""`hb serve`: the gateway alone, in the foreground."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from hb_assets.cli import output
from hb_assets.cli.app import AsJson, app, settings_of


@app.command()
def serve(
    context: typer.Context,
    as_json: AsJson = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Processes that share the port; HB_GATEWAY_WORKERS."),
    ] = None,
) -> None:
    """Serve the HTTP gateway alone, until Ctrl-C; `hb up` runs it together with all the rest."""
    settings = settings_of(context)
    if workers is not None:
        settings = settings.model_copy(update={"gateway_workers": workers})
    from hb_assets.gateway import server
    from hb_assets.gateway.workers import LOG_FORMAT

    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)

    scheme = "https" if settings.gateway_cert else "http"
    url = f"{scheme}://{settings.gateway_host}:{settings.gateway_port}"

    def ready() -> None:
        if as_json:
            output.print_json({"gateway": url})
        else:
            output.note(f"the gateway serves {url}, until Ctrl-C")

    server.serve(settings, ready)
