"""Draw docs/assets/app.webp: screenshots of the page in a headless Chromium.

    fewstep distill --recipe tcd --config world/distill.yaml --out runs/tcd
    python tools/app_film.py runs   # while it trains

Needs the extra `app`, selenium, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from PIL import Image

from fewstep.web_app.models import Models, Request
from fewstep.web_app.page import build
from support.page import Visitor, chromium, served

PROMPT = "three frogs on yellow"


def scenes(visitor: Visitor) -> Iterator[None]:
    """Use the page; yield when a screenshot is due."""
    loaded = "return [...document.querySelectorAll('{} img')].filter((each) => each.naturalWidth).length"

    def pictures(place: str, count: int = 1) -> None:
        visitor.wait(lambda: visitor.driver.execute_script(loaded.format(place)) == count)

    for part in (PROMPT[:11], PROMPT[11:]):  # typing
        before = visitor.text("status")
        visitor.type(part)
        visitor.wait(lambda before=before: visitor.text("status") not in ("", "type a prompt", before))
        pictures("#picture")
        yield
    visitor.tick("beside")
    visitor.wait(lambda: "teacher" in visitor.text("times"))
    pictures("#pair", 2)
    yield
    visitor.click("keep")
    visitor.wait(lambda: "kept" in visitor.text("status"))
    visitor.tab("Sheet")
    visitor.click("sheet")
    visitor.wait(lambda: "3 of 3" in visitor.text("progress"))
    pictures("#tiles")
    yield
    visitor.tab("Run")
    visitor.find("#run input").click()
    visitor.wait(lambda: visitor.find("#run li, ul li[role=option]")).click()
    visitor.wait(lambda: "step" in visitor.text("state"))
    pictures("#grid")
    yield
    visitor.tab("Gallery")
    visitor.wait(lambda: visitor.find("#gallery button img")).click()
    visitor.wait(lambda: PROMPT in visitor.text("inside"))
    yield


def film(driver: Any, address: str, width: int) -> Image.Image:
    """Return the screenshots, two a row."""
    shots = []
    for _ in scenes(Visitor(driver, address)):
        driver.execute_async_script("setTimeout(arguments[0], 1500)")  # plots and pictures fade in
        shots.append(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB"))
    height = round(width * shots[0].height / shots[0].width)
    strip = Image.new("RGB", (2 * width + 8, (height + 8) * ((len(shots) + 1) // 2) - 8), "white")
    for number, shot in enumerate(shots):
        strip.paste(
            shot.resize((width, height), Image.Resampling.LANCZOS),
            (number % 2 * (width + 8), number // 2 * (height + 8)),
        )
    return strip


def main() -> None:
    """Serve the page, use it, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="folder of runs")
    parser.add_argument("--out", default="docs/assets/app.webp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        models = Models([options.runs])
        models.draw(Request(PROMPT))  # loads them
        page = build(models, Path(kept), "", "auto", "")
        with served(page, Path(kept)) as address, chromium() as driver:
            film(driver, address, 800).save(options.out, quality=80, method=6)


if __name__ == "__main__":
    main()
