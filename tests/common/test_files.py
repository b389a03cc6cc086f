"""Files are whole or absent, and what was there before stays until the new one is whole."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from fewstep.common import files
from fewstep.common.errors import UserError
from fewstep.common.files import (
    atomic_folder,
    atomic_write,
    check_writable,
    file_lock,
    hold_folder,
    read_json,
    remove_folder,
    sweep,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target) as part:
        part.write_text("new")
        assert not target.exists()
        assert part.parent == target.parent  # a rename within one file system
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert names(target.parent) == ["a.txt"]


FAILURES = [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


def fail_to_write(target: Path, error: BaseException) -> None:
    with atomic_write(target) as part:
        part.write_text("half")
        raise error


def fail_to_fill(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as part:
        (part / "new").write_text("half")
        raise error


@pytest.mark.parametrize("error", FAILURES)
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        fail_to_write(target, error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot write .*a.txt: No space left on device; nothing was left there$"):
        fail_to_write(tmp_path / "a.txt", FAILURES[-1])


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", Path("/proc/fewstep/x")):
        with pytest.raises(UserError, match=r"cannot write .*choose a writable folder"), atomic_write(place):
            pass
        with pytest.raises(UserError, match=r"cannot write .*choose a writable folder"), atomic_folder(place):
            pass


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for text in ("one", "two"):
        with atomic_folder(target) as part:
            (part / text).write_text(text)
            (part / "sub").mkdir()
            assert not (target / text).exists()
        assert names(target) == sorted([text, "sub"])
        assert names(tmp_path) == ["run"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_a_folder_that_is_kept_is_not_replaced(tmp_path: Path) -> None:
    """Who came second throws away its own: others may be reading the first one."""
    target = tmp_path / "made"
    with atomic_folder(target, keep=True) as part:
        (part / "a").write_text("second")
        with atomic_folder(target, keep=True) as first:
            (first / "a").write_text("first")
    assert (target / "a").read_text() == "first"
    assert names(tmp_path) == ["made"]


def test_another_process_is_waited_for(tmp_path: Path) -> None:
    lock, done = tmp_path / "cache" / ".lock", tmp_path / "done"
    code = (
        "import pathlib, sys\nfrom fewstep.common.files import file_lock\n"
        "with file_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n    input()\n    pathlib.Path(sys.argv[2]).touch()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(lock), str(done)], text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        later = Timer(0.2, other.communicate, ["\n"])
        later.start()
        with file_lock(lock):
            assert done.exists()
        later.join()


@pytest.mark.parametrize("error", FAILURES)
def test_a_failed_folder_keeps_the_old_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        fail_to_fill(target, error)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt("broken")])
def test_a_failed_swap_puts_the_old_folder_back(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old")
    plain = Path.replace

    def replace(self: Path, other: Path) -> Path:
        if self.name.endswith(".part"):
            raise error
        return plain(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    raised = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised, match="broken"), atomic_folder(target) as part:
        (part / "new").write_text("new")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["run"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as part:
        (part / "new").touch()
    assert names(tmp_path / "real") == ["new"]
    assert names(tmp_path) == ["link", "real"]


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.x1.part", ".b.x3.old", "b", ".d.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    for name in (".c.x2.part", "kept.part", ".hidden", "kept.old"):
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert names(tmp_path) == [".hidden", "b", "kept.old", "kept.part"]
    assert (tmp_path / "b" / "x").read_text() == "b"


def test_a_folder_whose_successor_was_not_yet_in_place_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames of a swap: the old folder is the only whole one."""
    target = tmp_path / "best"
    with atomic_folder(target) as part:
        (part / "x").write_text("old")
    plain = Path.replace

    def stop(self: Path, to: Path) -> Path:
        if self.suffix == ".part":
            os._exit(9)
        return plain(self, to)

    pid = os.fork()
    if not pid:
        monkeypatch.setattr(Path, "replace", stop)
        with atomic_folder(target) as part:
            (part / "x").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not target.exists()
    sweep(tmp_path)
    assert names(tmp_path) == ["best"]
    assert (target / "x").read_text() == "old"


def test_a_folder_is_removed_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "a").write_text("")
    seen: list[list[str]] = []
    plain = files.shutil.rmtree
    monkeypatch.setattr(files.shutil, "rmtree", lambda f, *a, **k: (seen.append(names(tmp_path)), plain(f, *a, **k)))
    remove_folder(folder)
    assert seen[-1] == [".step-1.gone"]
    assert names(tmp_path) == []


def test_checking_a_place_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    check_writable("runs/x")
    check_writable(".")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "a", Path("/proc/a/b")):
        with pytest.raises(UserError, match="cannot write"):
            check_writable(place)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device"):
        check_writable(tmp_path)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "八", "n": [1, 2.5, None]})
    assert read_json(path) == {"name": "八", "n": [1, 2.5, None]}
    assert "八" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["n"] == [1, 2.5, None]
    assert names(tmp_path) == ["a.json"]
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "none.json")


def test_a_run_folder_belongs_to_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fewstep.common.files import hold_folder\n"
        "with hold_folder(Path(sys.argv[1])): print('taken', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "taken\n"
        words = f"is in use by process {other.pid}; wait for it, or give another --out"
        with pytest.raises(UserError, match=words), hold_folder(tmp_path):
            pass
        other.kill()
    for _ in range(2):  # a killed process holds nothing, and a block that has ended neither
        with hold_folder(tmp_path), hold_folder(tmp_path):
            busy = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            assert f"is in use by process {os.getpid()}" in busy.stderr
