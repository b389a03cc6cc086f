"""Type into the page in a headless Chromium: time from a key to its picture, memory, errors in between.

    python benchmarks/app_keystrokes.py --keys 1000

Needs the extra `app`, selenium, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import psutil

from fewstep.common.errors import UserError
from fewstep.web_app.models import Drawn, Models, Request
from fewstep.web_app.page import build
from support.page import WATCH, Visitor, chromium, served

WORDS = "three frogs on yellow, a rocket left of a gem stone, "
LAST = "two sailboats on red checks"


@dataclass
class Figures:
    """What was measured.

    Attributes:
        latencies: milliseconds from a single key to its picture in the browser.
        computing: milliseconds of the drawing alone, of the same pictures.
        last: milliseconds from the last key of all to the last picture.
        drawn, failed: pictures, and errors that were injected.
        memory: of the server, MB, ten times over the run.
        right: whether the last picture is that of the last prompt.
    """

    latencies: list[float] = field(default_factory=list)
    computing: list[float] = field(default_factory=list)
    last: float = 0.0
    drawn: int = 0
    failed: int = 0
    memory: list[float] = field(default_factory=list)
    right: bool = False


class Failing:
    """Models whose drawings fail at times: every `every`-th, by an error of the user or of the program in turn."""

    def __init__(self, models: Models, every: int, figures: Figures) -> None:
        self.draw_right = models.draw
        self.every = every
        self.figures = figures
        self.calls = itertools.count(1)

    def draw(self, request: Request, *rest: Any) -> Drawn:
        """Draw, or fail."""
        call = next(self.calls)
        if self.every and call % self.every == 0:
            self.figures.failed += 1
            raise (RuntimeError if call % (2 * self.every) else UserError)("injected")
        drawn = self.draw_right(request, *rest)
        self.figures.drawn += 1
        self.figures.computing.append(1000 * drawn.seconds)
        return drawn


def type_keys(
    models: Models, teacher: str, lora: str, kept: Path, keys: int, pause: float, every: int, singles: int = 20
) -> Figures:
    """Type single keys for their latency, then `keys` of them in a row.

    Args:
        pause: seconds between keys.
        every: which drawings fail; 0 for none.
        singles: keys whose latency is measured, each after the picture of the one before.
    """
    figures, process = Figures(), psutil.Process()
    with served(build(models, kept, teacher, lora, ""), kept) as address, chromium() as driver:
        visitor = Visitor(driver, address)
        visitor.type(WORDS[0])
        visitor.wait(lambda: "evaluations" in visitor.text("status") and visitor.picture().any())
        driver.execute_script(WATCH)
        failing = Failing(models, 0, figures)
        models.draw = failing.draw  # type: ignore[method-assign]
        for letter in WORDS.replace(" ", "")[1 : singles + 1]:  # a space at the end changes no picture
            before = len(driver.execute_script("return window.shown"))
            visitor.type(letter)
            visitor.wait(lambda before=before: len(driver.execute_script("return window.shown")) == before + 2)
            typed, drawn = driver.execute_script("return window.shown.slice(-2)")
            figures.latencies.append(drawn["drawn"] - typed["typed"])
        alone = len(figures.computing)
        failing.every = every
        for number in range(keys):
            if number % 120 == 0:
                visitor.find("#prompt textarea").clear()
            if number % max(1, keys // 10) == 0:
                figures.memory.append(process.memory_info().rss / 2**20)
            visitor.type(WORDS[number % len(WORDS)])
            time.sleep(pause)
        failing.every = 0
        visitor.type(LAST, clear=True)
        expected = failing.draw_right(Request(LAST, teacher, lora, 0, *shown_settings(visitor))).picture
        visitor.wait(lambda: visitor.shows(expected))
        figures.right = True
        events = driver.execute_script("return window.shown")
        typed = max(event["typed"] for event in events if "typed" in event)
        figures.last = max(event["drawn"] for event in events if "drawn" in event) - typed
        figures.memory.append(process.memory_info().rss / 2**20)
        figures.computing = figures.computing[:alone]
    return figures


def shown_settings(visitor: Visitor) -> tuple[int, float]:
    """Return steps and gamma as the page shows them."""
    values = [visitor.find(f"#{name} input[type=number]").get_attribute("value") for name in ("steps", "gamma")]
    return int(values[0]), float(values[1])


def main() -> None:
    """Measure with the bundled teacher, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.08)
    parser.add_argument("--every", type=int, default=10, help="which drawings fail")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        found = type_keys(Models([kept]), "", "auto", Path(kept), options.keys, options.pause, options.every)
    ordered = sorted(found.latencies)
    print(f"key to picture: median {statistics.median(ordered):.0f} ms, longest {ordered[-1]:.0f} ms", end="; ")
    beyond = statistics.median(key - alone for key, alone in zip(found.latencies, found.computing))
    print(
        f"drawing alone: median {statistics.median(found.computing):.0f} ms; the rest of each: median {beyond:.0f} ms"
    )
    print(
        f"{options.keys} keys: {found.drawn} pictures, {found.failed} injected errors, last picture {found.last:.0f} ms"
    )
    print("memory, MB:", " ".join(f"{each:.0f}" for each in found.memory))
    print("last prompt's picture shown:", found.right)


if __name__ == "__main__":
    main()
