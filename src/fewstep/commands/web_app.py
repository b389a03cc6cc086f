"""`fewstep app`: a page to type into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.common.arguments import checked


@checked
def app(
    folders: str | Sequence[str] = (".",),
    *,
    teacher: Path | str = "",
    lora: Path | str = "auto",
    teacher_config: Path | str = "",
    out: Path | str = "pictures",
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    precision: str = "fp32",
) -> None:
    """Open a page that draws while you type, compares student and teacher, and watches runs.

    Serves until Ctrl-C. The address is printed; other machines reach it only with --host.

    Example: fewstep app runs models

    Args:
        folders: folders whose pipelines, single files, LoRAs and runs the page offers; it reads no others.
        teacher: first teacher, a pipeline folder, single-file checkpoint or hub id; if omitted, the bundled one.
        lora: first student: a LoRA file or folder, a bundled student by name, none, or auto.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        out: folder of the pictures that are kept.
        host: address to listen at; 0.0.0.0 lets any machine of the network draw, without a password.
        port: port to listen at; 0 for a free one.
        device: auto, cpu or cuda.
        precision: precision of the denoiser, auto, fp32, bf16 or fp16.

    Raises:
        UserError: a folder, teacher or student that does not exist, a port in use, or a missing extra.
    """
    from fewstep.common.extras import check_installed
    from fewstep.common.files import check_writable

    check_installed("fewstep app", ("gradio",), "app")
    check_writable(out)
    from fewstep.web_app.models import Models
    from fewstep.web_app.server import serve

    first = str(teacher), str(lora)
    places = [folders] if isinstance(folders, str) else folders
    models = Models(places, first, teacher_config=str(teacher_config), device=device, precision=precision)
    serve(models, Path(out).resolve(), *first, host, port)
