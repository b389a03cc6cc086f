"""The report, its table, its claims and its curves, on planted figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.common.errors import UserError
from fewstep.evaluation.metric import Figure, Identity
from fewstep_worlds.emoji8.report.claims import Claim, claims, claims_table
from fewstep_worlds.emoji8.report.curves import gamma_figure, gamma_panels, step_panels, svg
from fewstep_worlds.emoji8.report.lines import headline, lines, paired, summary
from fewstep_worlds.emoji8.report.page import embed_grid, write_report
from fewstep_worlds.emoji8.report.results import Results, Row, load_results, save_results
from fewstep_worlds.emoji8.report.step_table import step_table, table1

STEPS = (2, 4, 8, 20)
# Table 1 of arXiv 2402.19159: FID and image complexity.
FD = {
    "Euler": (104.73, 44.31, 18.20, 14.72),
    "DDIM": (104.73, 44.31, 18.20, 14.72),
    "DPM-Solver++(2S)": (46.08, 18.50, 12.49, 12.15),
    "LCM": (16.15, 15.03, 16.93, 18.13),
    "TCD": (14.66, 12.68, 13.64, 13.56),
}
DETAIL = {
    "Euler": (4.456, 3.633, 4.148, 4.481),
    "DDIM": (4.456, 3.633, 4.148, 4.481),
    "DPM-Solver++(2S)": (2.876, 4.496, 4.788, 4.679),
    "LCM": (4.300, 4.364, 4.260, 4.057),
    "TCD": (4.701, 5.095, 5.336, 5.563),
}
EVIL = "<script>alert(\"x\")</script> & 'quotes'"
IDENTITIES = {
    "FD-Lite0": Identity("FD-Lite0", "distance of features", "lower", "", "Frechet", "quality", "real", n=1000, seed=0),
    "agreement": Identity("agreement", "fit to the prompt", "higher", "cosine", "mean", "prompt", n=1000, seed=0),
    "detail: edges": Identity("detail: edges", "gradient", "neither", "levels/pixel", "mean", "detail", n=1000, seed=0),
}


def figure(name: str, value: float, width: float = 0.01) -> Figure:
    return Figure(value, value - width, value + width, 1000, None, IDENTITIES[name])


def planted(seeds: tuple[int, ...] = (0,), prompts: int = 6) -> Results:
    rows = []
    for method in FD:
        for seed in seeds:
            for fd, edges, steps in zip(FD[method], DETAIL[method], STEPS):
                rows.append(
                    Row(
                        method,
                        steps,
                        seed,
                        {
                            "FD-Lite0": figure("FD-Lite0", fd + 0.1 * seed),
                            "agreement": figure("agreement", 0.9 - fd / 1000),
                            "detail: edges": figure("detail: edges", edges),
                        },
                        gamma=0.2 if method == "TCD" else None,
                        omega=None if method in ("TCD", "LCM") else 8.0,
                        scores={"agreement": [0.9 - fd / 1000 + 0.01 * i for i in range(prompts)]},
                        calls_note="" if method in ("TCD", "LCM") else "two evaluations a call",
                    )
                )
    rows.append(Row("teacher", 50, 0, {"FD-Lite0": figure("FD-Lite0", 13.0)}, omega=8.0))
    return Results(
        title=f"planted {EVIL}",
        rows=tuple(rows),
        real={"FD-Lite0": figure("FD-Lite0", 5.0)},
        scale={"real": {"detail: edges": figure("detail: edges", 5.0)}},
        prompts=(EVIL, "octopus", *(f"prompt {i}" for i in range(prompts - 2))),
        settings={"command": "fewstep demo", EVIL: EVIL},
        caveats=(EVIL,),
    )


def pictures(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)


def sweep() -> Results:
    rows = [
        Row("TCD", steps, 0, {"FD-Lite0": figure("FD-Lite0", 10 + gamma + steps)}, gamma=gamma)
        for gamma in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        for steps in STEPS
    ]
    return Results("sweep", tuple(rows))


def without(results: Results, method: str, steps: int | None = None) -> Results:
    return replace(results, rows=tuple(r for r in results.rows if (r.method, steps or r.steps) != (method, r.steps)))


def changed(results: Results, method: str, metric: str, values: dict[int, float]) -> Results:
    def change(row: Row) -> Row:
        if row.method != method or row.steps not in values:
            return row
        return replace(row, figures={**row.figures, metric: figure(metric, values[row.steps])})

    return replace(results, rows=tuple(change(row) for row in results.rows))


def claim(found: list[Claim], *words: str) -> Claim:
    (match,) = [c for c in found if all(word in c.text for word in words)]
    return match


class Page(HTMLParser):
    """What a browser would make of it: tags, where they point, and the visible text."""

    void = frozenset({"meta", "img", "br", "path", "use", "line", "rect"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.alts: list[str] = []
        self.open: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.void else [tag]
        for name, value in attrs:
            self.links += [value or ""] if name in ("src", "href", "xlink:href", "action", "data", "srcset") else []
            self.ids += [value or ""] if name == "id" else []
            self.alts += [value or ""] if name == "alt" else []
            assert not name.startswith("on")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = [("teacher, 50 calls", pictures()), (f"TCD {EVIL}", pictures(seed=1))]
    assert write_report(path, planted(), rows, sweep=sweep(), command='fewstep sample "a <b>"') == path
    return Page(path)


def test_the_users_text_is_text(page: Page) -> None:
    assert "script" not in page.tags
    assert "<script" not in page.raw
    assert page.text.count(EVIL) >= 6  # title twice, caveat, column, row, setting and its value, prompts
    assert f"{EVIL}, teacher, 50 calls" in page.alts
    assert 'fewstep sample "a <b>"' in page.text


def test_nothing_is_fetched(page: Page) -> None:
    assert {"img", "use"} <= set(page.tags)
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in page.links)
    assert "http:" not in page.raw
    assert "https:" not in page.raw
    assert not re.search(r"url\((?!#)|@import", page.raw)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)


def test_drawings_do_not_share_ids(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_page_shows_everything(page: Page) -> None:
    assert page.tags.count("img") == 4
    assert page.tags.count("figure") == 3 + 1  # a panel a metric; FD against gamma
    for text in ("12.68", "TCD minus LCM", "✓ held", "5.0", "two evaluations a call", "levels/pixel"):
        assert text in page.text
    assert "Euler, DDIM, DPM-Solver++(2S): two evaluations a call" in page.text
    assert len(page.raw) < 3_000_000


def test_grid_must_fit_its_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'TCD' of the grid has 3 pictures for 2 prompts"):
        write_report(tmp_path / "r.html", planted(), [("teacher", pictures()), ("TCD", pictures(3))])
    with pytest.raises(UserError, match="2 pictures for 1 prompts"):
        write_report(tmp_path / "r.html", planted(), [("teacher", pictures())], grid_prompts=["one"])
    assert list(tmp_path.iterdir()) == []


def test_report_of_very_little(tmp_path: Path) -> None:
    rows = (Row("mine", 3, 0, {"FD-Lite0": Figure(1.0, None, None, 500)}),)
    page = Page(write_report(tmp_path / "r.html", Results("little", rows), []))
    assert "not measured" in page.text
    assert page.tags.count("img") == 0


def test_large_grids_are_lossy() -> None:
    small, large = embed_grid([pictures(1)], 10**9), embed_grid([pictures(1)], 10)
    assert len(large[0][0]) < len(small[0][0]) / 2


def test_table_has_the_papers_shape() -> None:
    found = table1(planted(), ["FD-Lite0", "agreement", "detail: edges"]).splitlines()
    assert found[0] == (
        "| calls | FD-Lite0 ↓: 2 | 4 | 8 | 20 | agreement ↑: 2 | 4 | 8 | 20 | detail: edges: 2 | 4 | 8 | 20 |"
    )
    assert [line.split(" | ")[0] for line in found[2:7]] == [f"| {method}" for method in FD]
    assert found[6].startswith("| TCD | **14.7** | **12.7** | 13.6 | 13.6 | **0.885** |")
    assert found[4].startswith("| DPM-Solver++(2S) | 46.1 | 18.5 | **12.5** | **12.2** | 0.854 |")
    assert "**" not in found[5]  # LCM is best nowhere; detail has no better end
    assert found[6].endswith("| 4.70 | 5.09 | 5.34 | 5.56 |")
    assert "| teacher, 50 calls | 13.0 |  |  |" in found
    assert "| real pictures | 5.0 |  |  |" in found
    assert "- FD-Lite0: distance of features (n = 1000, 1 seed)." in found


def test_table_over_seeds() -> None:
    table = step_table(planted((0, 1, 2)), ["FD-Lite0"])
    cell = dict(table.rows)["TCD"][0][1]
    assert (cell.text, cell.spread, cell.best) == ("12.8", "0.1", True)
    assert cell.markdown == "**12.8 ± 0.1**"
    assert dict(table.rows)["LCM"][0][1].best is False


def test_spread_that_would_print_as_zero_gets_a_decimal() -> None:
    rows = [Row("TCD", 4, seed, {"FD-Lite0": figure("FD-Lite0", 12.68 + 0.01 * seed)}) for seed in (0, 1, 2)]
    cell = step_table(Results("t", tuple(rows)), ["FD-Lite0"]).rows[0][1][0][1]
    assert (cell.text, cell.spread) == ("12.69", "0.01")


def test_ties_are_both_bold() -> None:
    table = step_table(changed(planted(), "LCM", "FD-Lite0", {4: 12.681}), ["FD-Lite0"])
    assert [label for label, blocks in table.rows if blocks[0][1].best] == ["LCM", "TCD"]


def test_table_warns_of_figures_that_do_not_compare() -> None:
    results = planted()
    row = results.rows[0]
    other = replace(row.figures["FD-Lite0"], identity=replace(IDENTITIES["FD-Lite0"], reduction="another"))
    mixed = replace(results, rows=(replace(row, figures={**row.figures, "FD-Lite0": other}), *results.rows[1:]))
    assert any("was not measured in one way" in note for note in step_table(mixed, ["FD-Lite0"]).notes)
    assert not any("Caution" in note for note in step_table(results, ["FD-Lite0"]).notes)


def test_mean_and_spread_over_seeds() -> None:
    results = planted((0, 1, 2))
    found = summary(headline(results, "TCD"), 4, "FD-Lite0")  # type: ignore[arg-type]
    assert found is not None
    assert (found.mean, found.spread, found.seeds) == (pytest.approx(12.78), pytest.approx(0.1), 3)
    assert (found.low, found.high) == (pytest.approx(12.68), pytest.approx(12.88))
    exclusive = summary(headline(planted(), "TCD"), 4, "FD-Lite0")  # type: ignore[arg-type]
    assert exclusive is not None
    assert (exclusive.spread, exclusive.low, exclusive.high) == (None, 12.67, 12.69)


def test_settings_of_one_method_are_lines_of_their_own() -> None:
    assert [line.label for line in lines(sweep())][:2] == ["TCD, γ = 0", "TCD, γ = 0.2"]
    chosen = headline(sweep(), "TCD")
    assert chosen is not None
    assert chosen.label == "TCD, γ = 0.2"
    tuned = [Row("TCD tuned", s, 0, {}, gamma=g) for s, g in ((2, 0.4), (4, 0.2))]
    assert [line.label for line in lines(Results("t", tuple(tuned)))] == ["TCD tuned"]
    guided = [Row("DDIM", 4, 0, {}, omega=omega) for omega in (3.0, 8.0)]
    assert [line.label for line in lines(Results("t", tuple(guided)))] == ["DDIM, ω = 3", "DDIM, ω = 8"]


def test_a_sweep_is_no_part_of_the_table() -> None:
    beside = [replace(row, method="TCD, gamma sweep") for row in sweep().rows]
    results = replace(planted(), rows=(*planted().rows, *beside))
    assert [label for label, _ in step_table(results, ["FD-Lite0"]).rows] == list(FD)
    assert [s.label for s in step_panels(results, ["FD-Lite0"])[0].series] == list(FD)
    assert len(gamma_panels(results)[0].series) == 4
    assert [label for label, _ in step_table(sweep(), ["FD-Lite0"], gamma=0.4).rows] == ["TCD, γ = 0.4"]


def test_paired_difference_is_taken_prompt_by_prompt() -> None:
    a = Row("A", 4, 0, {}, scores={"agreement": [1.0, 2.0, 3.0]})
    b = Row("B", 4, 0, {}, scores={"agreement": [0.5, 1.5, 2.5]})
    found = {line.label: line for line in lines(Results("t", (a, b, replace(a, seed=1), replace(b, seed=2))))}
    difference = paired(found["A"], found["B"], 4, "agreement")
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert paired(found["A"], found["B"], 8, "agreement") is None
    assert paired(found["A"], found["B"], 4, "another") is None
    short = lines(Results("t", (replace(b, scores={"agreement": [1.0]}),)))[0]
    with pytest.raises(UserError, match=r"scores of \[1, 3\] prompts"):
        paired(found["A"], short, 4, "agreement")


def test_claims_hold_on_the_papers_own_table() -> None:
    found = claims(planted())
    assert [c.held for c in found if "teacher" not in c.text] == [True] * (len(found) - 1)
    assert claim(found, "within 10 % of the teacher").held is True
    assert claim(found, "TCD at 4 calls", "LCM at 4").figures == {"TCD at 4": 12.68, "LCM at 4": 15.03}
    assert claim(found, "twice").note == "LCM +21 %, TCD +7 %"
    assert len(found) == 4 + 1 + 2 + 4 + 1 + 1


def test_methods_are_compared_by_their_distance_to_the_teacher_too() -> None:
    """There the order may be another one."""
    name = "FD-Lite0 (to teacher)"

    def add(row: Row) -> Row:
        further = row.method == "TCD"
        identity = replace(IDENTITIES["FD-Lite0"], name=name, against="teacher")
        value = 30.0 if further else 20.0 + row.steps
        return replace(row, figures={**row.figures, name: replace(figure("FD-Lite0", value), identity=identity)})

    found = claims(replace(planted(), rows=tuple(add(row) for row in planted().rows)))
    held = {c.text: c.held for c in found if c.text.endswith(name)}
    assert held[f"TCD at 4 calls is better than LCM at 4 in {name}"] is False
    assert held[f"TCD at 20 calls is better than LCM at 20 in {name}"] is True
    assert held[f"TCD at 4 calls is better than DDIM at 4 in {name}"] is False
    assert claim(found, "twice", name).held is True
    assert claim(found, "TCD at 4 calls", "LCM at 4", "FD-Lite0 (to teacher)").figures == {
        "TCD at 4": 30,
        "LCM at 4": 24,
    }


def test_claims_fail_where_figures_say_so() -> None:
    results = changed(planted(), "TCD", "FD-Lite0", {4: 15.5, 8: 14.4, 20: 18.0})
    found = claims(results)
    assert claim(found, "TCD at 4 calls", "LCM at 4").held is False
    assert claim(found, "TCD at 2 calls", "LCM at 2").held is True
    assert claim(found, "twice").held is False  # +21 % and +16 %
    assert claim(found, "within 10 % of the teacher").held is False  # +11 %
    best = replace(planted().rows[-1], method="teacher, omega 3", figures={"FD-Lite0": figure("FD-Lite0", 12.0)})
    teachers = replace(planted(), rows=(*planted().rows, best))
    assert claim(claims(teachers), "teacher, omega 3 at 50").held is False  # 13.64 is 14 % above its 12
    falling = changed(planted(), "TCD", "detail: edges", {20: 5.0})
    assert claim(claims(falling), "TCD's detail (edges)").held is False
    early = changed(planted(), "TCD", "detail: edges", {2: 5.2})  # the paper's rises from 2 calls on
    assert claim(claims(early), "TCD's detail (edges)").held is False
    rising = changed(planted(), "LCM", "detail: edges", {20: 5.0})
    assert claim(claims(rising), "LCM's detail (edges)").held is False
    apart = changed(planted(), "Euler", "FD-Lite0", {8: 17.0})
    assert claim(claims(apart), "equals DDIM").held is False
    # an unbiased distance near 0: a half apart, and yet a fortieth of the interval's width of .02
    near = changed(changed(planted(), "Euler", "FD-Lite0", {20: 1.0e-3}), "DDIM", "FD-Lite0", {20: 0.5e-3})
    assert claim(claims(near), "equals DDIM").held is True
    beyond = changed(near, "Euler", "FD-Lite0", {20: 4.0e-3})
    assert claim(claims(beyond), "equals DDIM").held is False


def test_claims_say_what_is_missing() -> None:
    found = claims(without(without(planted(), "LCM", 20), "teacher"))
    missing = claim(found, "TCD at 20 calls", "LCM at 20")
    assert (missing.held, missing.figures, missing.note) == (None, {}, "no FD-Lite0 of LCM at 20")
    assert claim(found, "TCD at 4 calls", "LCM at 4").held is True
    assert claim(found, "twice").held is None
    assert claim(found, "within 10 % of the teacher").held is None
    assert all(c.held is None for c in claims(Results("empty", ())))


def test_claims_use_kid_where_there_is_no_fd() -> None:
    def rename(row: Row) -> Row:
        return replace(row, figures={name.replace("FD-", "KID-"): f for name, f in row.figures.items()})

    def below_zero(row: Row) -> Row:
        if (row.method, row.steps) != ("TCD", 4):
            return row
        return replace(row, figures={"KID-Lite0": Figure(-0.001, None, None, 100)})

    results = planted()
    renamed = replace(results, rows=tuple(rename(row) for row in results.rows))
    found = claims(renamed)
    assert claim(found, "twice", "KID-Lite0").held is True
    zero = replace(renamed, rows=tuple(below_zero(row) for row in renamed.rows))
    assert claim(claims(zero), "twice").held is None  # a squared distance at or below 0 has no rise in %


def test_claims_say_when_intervals_overlap() -> None:
    near = changed(planted(), "LCM", "FD-Lite0", {4: 12.69})
    assert claim(claims(near), "TCD at 4 calls", "LCM at 4").note == "the intervals overlap"
    assert claim(claims(planted()), "TCD at 4 calls", "LCM at 4").note == ""


def test_claims_table() -> None:
    text = claims_table(claims(planted()))
    assert "| TCD at 4 calls is better than LCM at 4 in FD-Lite0 | held | TCD at 4: 12.68, LCM at 4: 15.03 |" in text


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    results = planted((0, 1))
    save_results(tmp_path / "results.json", results)
    assert load_results(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["title"] == results.title
    save_results(tmp_path / "empty.json", Results("empty", ()))
    assert load_results(tmp_path / "empty.json") == Results("empty", ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "format is 'list'"),
        ("{}", "format is None"),
        ("{", "not valid JSON"),
        ('{"format": "fewstep results 1", "rows": []}', "title: Field required"),
        ('{"format": "fewstep results 1", "title": "t", "rows": [{"method": "TCD"}]}', "rows.0.steps"),
        ('{"format": "fewstep results 1", "title": "t", "rows": [], "more": 1}', "more"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        load_results(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot read"):
        load_results(tmp_path / "none.json")


def test_the_same_row_twice_is_refused() -> None:
    row = planted().rows[0]
    with pytest.raises(UserError, match="two rows of Euler at 2 calls, seed 0, omega 8"):
        Results("t", (row, row))


def test_step_panels_hold_the_figures() -> None:
    panel = step_panels(planted(), ["FD-Lite0"])[0]
    assert (panel.teacher, panel.floor) == (13.0, 5.0)
    series = {s.label: s for s in panel.series}
    assert list(series) == list(FD)  # the teacher is a height, not a curve
    assert [point[1] for point in series["TCD"].points] == list(FD["TCD"])
    assert len({s.colour for s in panel.series}) == 5
    drawing = svg(panel, "p")
    assert drawing.startswith("<svg viewBox")
    assert "var(--s0)" in drawing
    assert "currentColor" in drawing
    assert "#0a0" not in drawing


@pytest.mark.parametrize("suffix", [".svg", ".png", ".webp"])
def test_gamma_figure(tmp_path: Path, suffix: str) -> None:
    path = gamma_figure(sweep(), tmp_path / f"gamma{suffix}")
    if suffix == ".svg":
        assert "20 calls" in path.read_text()
    else:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    panel = gamma_panels(sweep())[0]
    assert [s.label for s in panel.series] == ["2 calls", "4 calls", "8 calls", "20 calls"]
    assert [(x, y) for x, y, _, _ in panel.series[1].points][:2] == [(0.0, 14.0), (0.2, 14.2)]


def test_gamma_figure_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the nearest is g\.svg"):
        gamma_figure(sweep(), tmp_path / "g.pdf")
    with pytest.raises(UserError, match="no method has 3 gammas"):
        gamma_figure(planted(), tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []
