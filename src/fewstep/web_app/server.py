"""The page's server: this machine alone unless a host is named; browsers load nothing from elsewhere for it."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

# before gradio is imported: no reports, no search for newer versions, pictures in a folder of its own
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="fewstep-app-")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fewstep.common.defaults import installed_world
from fewstep.common.errors import UserError
from fewstep.web_app.models import Models
from fewstep.web_app.page import CSS, THEME, build

LOOPBACK = ["127.0.0.1", "localhost"]
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-ancestors 'none'"
)


class ContentPolicy:
    """Middleware that sends `POLICY` with each answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at an address; port 0 is a free one.

    Raises:
        UserError: the port is in use, or the host is not this machine.
    """
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        place.close()
        field = "host" if isinstance(error, socket.gaierror) else "port"
        raise UserError(
            f"{field}: cannot listen at {host}:{port}: {error}; give another --{field}", field=field
        ) from error
    return place


def make_server(blocks: gr.Blocks, host: str, kept: Path) -> uvicorn.Server:
    """Return the page's server; `run` it with a socket of `listen`.

    Args:
        kept: folder of the gallery, whose files are served as they are.
    """
    gr.set_static_paths([kept])
    # a name that other sites point at this machine is refused
    hosts = LOOPBACK if host in LOOPBACK else ["*"]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(ContentPolicy)]
    app = gr.mount_gradio_app(
        FastAPI(middleware=guards, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=1,  # nothing is uploaded
        theme=THEME,
        css=CSS,
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


def serve(models: Models, kept: Path, teacher: str, lora: str, host: str, port: int) -> None:
    """Serve the page until a signal; arguments as of `build` and `listen`.

    Raises:
        UserError: no such teacher or student, or as `listen`.
    """
    folder = models.teacher(teacher)
    models.student(folder, lora)
    world = installed_world()
    own = world is not None and folder.path.resolve() == (world.root() / "teacher").resolve()
    prompt = world.read_prompts("validation")[0] if world and own else ""
    place = listen(host, port)
    models.preload(teacher, lora)
    server = make_server(build(models, kept, teacher, lora, prompt), host, kept)
    print("http://{}:{}  (Ctrl-C ends it)".format(*place.getsockname()), flush=True)
    server.run(sockets=[place])
