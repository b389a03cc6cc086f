"""Lines and bars on stderr."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from fewstep.common import messages
from fewstep.common.messages import Bar, logger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with Bar(total=4, desc="work", unit="step", mininterval=0.0) as bar:
        for step in range(4):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_bar_writes_whole_lines_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LINE_EVERY", 0.0)
    text = shown(io.StringIO(), monkeypatch)
    assert "\r" not in text
    assert "\x1b" not in text
    assert [line.split("loss ")[1] for line in text.splitlines() if "loss" in line] == ["0", "1", "2", "3"]


def test_work_shorter_than_the_interval_writes_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch) == ""


def test_a_bar_redraws_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch)
    assert text.count("\n") == 1
    assert text.count("\r") >= 4


def test_the_logger_can_be_silenced_and_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("one")
    taken: list[str] = []

    class Own(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            taken.append(record.getMessage())

    own = Own()
    logger.addHandler(own)
    try:
        logger.info("two")
        logger.setLevel("WARNING")
        logger.info("three")
    finally:
        logger.setLevel("INFO")
        logger.removeHandler(own)
    assert capsys.readouterr().err.splitlines() == ["one", "two"]
    assert taken == ["two"]
