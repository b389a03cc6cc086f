"""The page's server: this machine alone unless a host is named; browsers load nothing from elsewhere for it."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fewstep.common.errors import UserError
from fewstep.web_app.models import Models
from fewstep.web_app.page import CSS, THEME, build

LOOPBACK = ["127.0.0.1", "localhost"]
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-ancestors 'none'"
)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 is a free one.

    Raises:
        UserError: the port is in use, or the host is not this machine.
    """
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        field = "port" if getattr(error, "errno", errno.EACCES) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise UserError(f"cannot listen at {host}:{port}: {error}; give another --{field}", field=field) from error


def make_server(blocks: gr.Blocks, host: str, kept: Path) -> uvicorn.Server:
    """Return the page's server; `run` it with a socket of `listen`.

    Args:
        kept: folder of the gallery, whose files are served as they are.
    """
    gr.set_static_paths([kept])
    hosts = LOOPBACK if host in LOOPBACK else ["*"]  # a name of another site that leads to this machine is refused
    site = FastAPI(openapi_url=None)
    site.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    options: dict[str, Any] = {"footer_links": [], "run_history": False, "theme": THEME, "css": CSS}
    gr.mount_gradio_app(site, blocks, path="/", max_file_size=1, **options)  # nothing is uploaded
    headers = [("content-security-policy", POLICY)]
    return uvicorn.Server(uvicorn.Config(site, log_level="critical", timeout_graceful_shutdown=1, headers=headers))


def serve(models: Models, kept: Path, teacher: str, lora: str, host: str, port: int) -> None:
    """Serve the page until a signal; arguments as of `build` and `listen`.

    Raises:
        UserError: no such teacher or student, or as `listen`.
    """
    models.preload(teacher, lora)
    prompt = "three frogs on yellow" if models.teacher(teacher).path.resolve() == models.bundled else ""
    with tempfile.TemporaryDirectory(prefix="fewstep-app-") as cache, listen(host, port) as place:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": cache}
        server = make_server(build(models, kept, teacher, lora, prompt), host, kept)
        print("http://{}:{}  (Ctrl-C ends it)".format(*place.getsockname()), flush=True)
        try:
            server.run(sockets=[place])
        finally:
            models.closed = True
