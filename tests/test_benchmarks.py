"""The benchmarks run and time what they print; the figures are not tested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matching
import performance
import pytest
import torch
from perf import synthesis
from perf.networks import SHAPES, Shape, modules
from perf.script import LcmScript
from perf.steps import Clock
from perf.timing import Timed, in_turn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.common.compilation import compile_networks
from support import tiny_pipelines as tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd(tmp_path_factory.mktemp("tiny") / "sd")


def rows(text: str) -> dict[str, list[str]]:
    """The first cells of each table, by its title."""
    tables = re.findall(r"^## (.+)\n\n.+\n.+\n((?:\|.+\n)+)", text, re.MULTILINE)
    return {title: [line.split("|")[1].strip() for line in body.splitlines()] for title, body in tables}


def options(folder: Path, cache: Path, *kinds: str) -> list[str]:
    return ["--network", str(folder), "--rank", "2", "--batch", "2", "--rounds", "2", "--cache", str(cache),
            "--what", *kinds]  # fmt: skip


def test_each_kind_prints_its_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "BATCHES", 2)
    monkeypatch.setattr(synthesis, "FEWEST", 2)
    reported: dict[str, dict[str, Timed]] = {}
    table = performance.table

    def telling(title: str, found: dict[str, Timed], *more: Any) -> None:
        reported[title] = found
        table(title, found, *more)

    monkeypatch.setattr(performance, "table", telling)
    performance.main(options(folder, tmp_path, "stored", "online", "sampling", "synthesis"))
    text = capsys.readouterr().out
    scripts, phases = ["script", "script without encoders"], ["student, forward", "target"]
    begins, ends = ["waiting for the batch"], ["the rest of the loss", "backward", "clipping, optimiser, log"]
    assert rows(text) == {
        "a training step, stored": ["ours", "student", "target", "F", *scripts],
        "our step by phase, stored, in a pass of its own": [*begins, *phases, *ends],
        "a training step, online": ["ours", "student", "target", "F", "teacher", *scripts],
        "our step by phase, online, in a pass of its own": [*begins, *phases, "teacher", *ends],
        "pictures at 4 steps": ["ours", "calls + decode", "diffusers", "LoRA, merged", "LoRA, not merged"],
        "a synthesised set of latents": ["ours", "guided calls"],
        "a synthesised set of trajectories": ["ours", "guided calls"],
    }
    printed = re.findall(r"^\| (?!what|---)[^|]+\| (-?[\d.]+) \|", text, re.MULTILINE)
    assert printed == [f"{timed.median:.4f}" for found in reported.values() for timed in found.values()]
    for kind in ("latents", "trajectories"):  # what a sample costs is a difference of two timings: noise has no sign
        reported[f"a synthesised set of {kind}"].pop("ours")
    assert all(timed.median > 0 for found in reported.values() for timed in found.values())
    assert len(re.findall(r"^.+ / .+: -?[\d.]+ \(", text, re.MULTILINE)) == 11


def test_what_a_step_holds_and_is_made_of(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: those of their own are slow to start."""
    monkeypatch.setattr(performance, "exclusive", lambda what, task, who: what(task, who))
    reported: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(
        performance, "each",
        lambda title, task, figure: reported.setdefault(title, {who: figure(task, who) for who in ("ours", "script")}),
    )  # fmt: skip
    performance.main(options(folder, tmp_path, "memory", "matrix"))
    held, matrix = reported.values()
    assert all(0.05 < gib < 64 for gib in held.values())
    assert all(0 < share < 1 for share in matrix.values())


def test_contenders_are_timed_in_their_own_precision() -> None:
    """Within a loop's autocast they are not in it, and a weight that it has converted before is converted anew."""
    weight = torch.ones(2, 2, requires_grad=True)
    outputs: list[tuple[bool, float]] = []

    def contender() -> None:
        about = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append((about, float((torch.ones(1, 2) @ weight).sum())))
        with torch.no_grad():
            weight.mul_(3)

    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            in_turn({"contender": contender}, torch.device("cpu"))
    assert outputs == [(False, 4.0), (False, 12.0)]


def test_the_small_network_has_sds_proportions() -> None:
    """Encoders in calls of the network, by operations: as on SD 1.5 to a tenth of a call."""

    def parts(shape: Shape) -> list[float]:
        with torch.device("meta"), torch.no_grad():
            unet, vae, text = modules(shape)
            x, picture = torch.zeros(1, 4, shape.side, shape.side), torch.zeros(1, 3, 8 * shape.side, 8 * shape.side)
            calls = (
                lambda: unet(x, torch.zeros(1), torch.zeros(1, 77, 768)),
                lambda: vae.encode(picture),
                lambda: vae.decode(x),
                lambda: text(torch.zeros(1, 77, dtype=torch.long)),
            )
            counted = []
            for call in calls:
                with FlopCounterMode(display=False) as counter:
                    call()
                counted.append(counter.get_total_flops())
        return [own / counted[0] for own in counted[1:]]

    for small, large in zip(parts(SHAPES["sd100m"]), parts(SHAPES["sd15"]), strict=True):
        assert abs(small - large) < 0.1


@pytest.mark.parametrize("large", [False, True])
def test_the_script_learns_its_adapter_alone(folder: Path, tmp_path: Path, large: bool) -> None:
    torch.manual_seed(0)
    place = tiny.sdxl(tmp_path / "sdxl") if large else folder
    script = LcmScript(place, 2, torch.rand(2, 3, 16, 16), ["a", "b"])
    before = {name: weight.detach().clone() for name, weight in script.unet.named_parameters()}
    taught = {name: weight.clone() for name, weight in script.teacher.named_parameters()}
    script.step()
    script.let_encoders_go()
    script.step_on_kept()
    changed = {name for name, weight in script.unet.named_parameters() if not torch.equal(weight, before[name])}
    assert changed <= {name for name in before if "lora_" in name}
    assert changed >= {name for name in before if "lora_B" in name}
    assert all(torch.equal(weight, taught[name]) for name, weight in script.teacher.named_parameters())
    with pytest.raises(AttributeError):
        script.step()


def test_the_scripts_encoders_have_its_types(folder: Path, tmp_path: Path) -> None:
    args = (torch.zeros(1, 3, 16, 16), ["a"])
    for place, vae in ((folder, torch.bfloat16), (tiny.sdxl(tmp_path / "sdxl"), torch.float32)):
        script = LcmScript(place, 2, *args, precision=torch.bfloat16)
        assert script.vae.dtype == vae
        assert script.pipe.text_encoder.dtype == torch.bfloat16
        assert script.teacher.dtype == script.unet.dtype == torch.float32
        script.step()


def test_the_autoencoder_takes_some_pictures_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = LcmScript(folder, 2, torch.zeros(5, 3, 16, 16), ["a"] * 5)
    seen: list[int] = []
    bare = script.vae.encode
    monkeypatch.setattr(script.vae, "encode", lambda part: seen.append(len(part)) or bare(part))
    assert script.encoded == 32
    script.encoded = 2
    assert len(script.latents()) == 5
    assert seen == [2, 2, 1]


def test_a_batch_is_read_while_our_clock_runs() -> None:
    events: list[str] = []
    clock = Clock({"others": lambda: events.append("others")}, torch.device("cpu"))
    fetch = clock.within(lambda number: events.append(f"read {number}"))
    loss = clock.around(lambda batch, rng: events.append("loss"))
    fetch(0)
    assert not clock._reads.acquire(blocking=False)  # the second one waits
    loss(None, None)
    fetch(1)
    assert not clock._reads.acquire(blocking=False)
    assert events == ["read 0", "others", "loss", "read 1"]


def test_a_fake_score_beside_the_exact_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before matching the fake score is the teacher: nothing is tracked and the whole gap is guidance."""
    words = ["--out", str(tmp_path), "--start", "3", "--shorter", "100", "--points", "300", "--omega", "3"]
    matching.main(words)
    text = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in text[0].strip("| ").split("|")]
    found = {cells[0]: dict(zip(names[2:], map(float, cells[2:]), strict=True)) for cells in (
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text[2:])}  # fmt: skip
    assert list(found) == ["joined", "before", "now"]
    for share in matching.LEVELS:
        assert (found["joined"][f"fake {share:g}"], found["joined"][f"untracked {share:g}"]) == (0, 1)
        assert 0 < found["before"][f"fake {share:g}"] < found["now"][f"fake {share:g}"]
    assert found["joined"]["guidance 0.75"] > found["joined"]["guidance 0.25"] >= 0
    matching.main([*words, "--follow", "sample", "--marks", "2"])
    assert len(capsys.readouterr().out.splitlines()) == len(matching.FOLLOWED)


def test_exact_scores_under_prompts_are_those_of_their_mixtures() -> None:
    x, t = torch.randn(40, 2, generator=torch.Generator().manual_seed(3)), torch.full((40,), 300.0, dtype=torch.float64)
    for prompt, law in enumerate(matching.LAWS):
        torch.testing.assert_close(
            matching.exact(x, t, torch.full((40,), prompt)), law.denoise(x.double(), t).eps.float()
        )
    points = matching.LAWS[0].sample(3000, matching.PATH.clean, torch.Generator().manual_seed(4))
    mean = matching.posterior(points, x.double(), t)
    assert float((mean - matching.LAWS[0].denoise(x.double(), t).x0).abs().max()) < 0.05


def test_compiled_roles_are_compared_role_by_role(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_networks, "__defaults__", ("eager",))  # graphs without a compiler
    performance.main(options(folder, tmp_path, "compiled"))
    text = capsys.readouterr().out
    found = {name: float(value) for name, value in re.findall(r"^\| ([^|]+?) \| ([\d.e+-]+\d) \|$", text, re.MULTILINE)}
    roles = ["student", "target", "fake"]
    assert list(found) == [*roles, "teacher", *(f"{role}, gradient" for role in roles), "the two nearest roles, eager"]
    nearest = found.pop("the two nearest roles, eager")
    assert max(found.values()) < 1e-4 < nearest
