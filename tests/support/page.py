"""The page in a headless Chromium. Not a test."""

from __future__ import annotations

import base64
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": tempfile.mkdtemp(prefix="fewstep-page-")}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1000"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
WATCH = """
window.shown = [];
window.last = document.querySelector('#picture img').src;
const area = document.querySelector('#prompt textarea');
area.addEventListener('input', () => window.shown.push({text: area.value, typed: performance.now()}), true);
new MutationObserver(async () => {
  const img = document.querySelector('#picture img');
  if (!img || img.src === window.last) return;
  window.last = img.src;
  await img.decode().catch(() => 0);
  window.shown.push({src: img.src, drawn: performance.now()});
}).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
"""
"""Script that records when text is typed and when the picture is replaced, in milliseconds."""
PIXELS = """
const done = arguments[0], img = document.querySelector('#picture img');
img.decode().then(() => {
  const canvas = document.createElement('canvas');
  canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
  canvas.getContext('2d').drawImage(img, 0, 0);
  done(canvas.toDataURL('image/png'));
});
"""


@contextmanager
def served(blocks: Any, kept: Path) -> Iterator[str]:
    """Serve a page in a thread; yield its address."""
    from fewstep.web_app.server import listen, make_server

    with listen("127.0.0.1", 0) as place:
        server = make_server(blocks, "127.0.0.1", kept)
        thread = Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        try:
            yield "http://127.0.0.1:{1}".format(*place.getsockname())
        finally:
            server.should_exit = True
            thread.join(20)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Debian's Chromium, without network use of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Visitor:
    """A person at the page."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.text("about"))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, name: str) -> str:
        return str(self.find(f"#{name}").text)

    def wait(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """Return the condition's value once it is true; elements may come and go meanwhile."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"the page shows {self.text('status')!r}, {self.text('about')!r}")

    def type(self, text: str, *, clear: bool = False) -> None:
        """Type into the prompt, key by key."""
        area = self.find("#prompt textarea")
        if clear:
            area.clear()
        area.send_keys(text)

    def click(self, name: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.find(f"#{name}, #{name} button, #{name} input"))

    def tick(self, name: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.find(f"#{name} input"))

    def tab(self, name: str) -> None:
        next(
            each for each in self.driver.find_elements("css selector", "button[role=tab]") if each.text == name
        ).click()

    def choose(self, name: str, value: str) -> None:
        """Type into a menu, and press Enter."""
        from selenium.webdriver.common.keys import Keys

        area = self.find(f"#{name} input")
        area.click()
        area.send_keys(Keys.CONTROL, "a")
        area.send_keys(value, Keys.ENTER)

    def set(self, name: str, value: float) -> None:
        """Set a number, which may have yet to appear."""
        from selenium.webdriver.common.keys import Keys

        area = self.wait(lambda: self.find(f"#{name} input[type=number]"))
        area.send_keys(Keys.CONTROL, "a")
        area.send_keys(f"{value:g}", Keys.TAB)

    def picture(self) -> np.ndarray:
        """Return the pixels of the picture that is shown."""
        data = self.driver.execute_async_script(PIXELS).partition(",")[2]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def shows(self, picture: Image.Image) -> bool:
        """Return whether a picture is shown, pixel by pixel."""
        found = self.picture()
        return found.shape[:2] == picture.size[::-1] and bool((found == np.asarray(picture)).all())
