"""Results of a comparison of methods: one row for each method, step count, setting and seed, kept as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fewstep.common.errors import UserError
from fewstep.common.files import read_json, write_text
from fewstep.evaluation.metric import Against, Figure, Group, Identity

FORMAT = "fewstep results 2"
By = Literal["nfe", "steps"]
"""Count that rows are compared at: network evaluations, the cost of a picture, or steps, which papers count."""


@dataclass(frozen=True)
class Row:
    """One measured set of pictures: one picture a prompt, all from one seed.

    Attributes:
        method: "TCD", "LCM", "DDIM", "Euler", "DPM-Solver++(2S)", "teacher", or any other name.
        steps: steps of the sampler a picture.
        seed: of the noise.
        figures: by metric.
        nfe_a_step: network evaluations of a step: 2 if it is guided, twice as many if its sampler makes two calls.
        gamma: stochasticity of sampling, None where the method has none.
        omega: guidance in the papers' convention, None where the method is not guided.
        scores: a number a prompt by metric, all rows in the same order of prompts: for paired comparisons.
        note: what a reader must know.
        commit: of the code that drew and measured it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    method: str
    steps: int
    seed: int
    figures: dict[str, Figure]
    nfe_a_step: int = 1
    gamma: float | None = None
    omega: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    commit: str = ""

    @property
    def nfe(self) -> int:
        """Network evaluations a picture."""
        return self.steps * self.nfe_a_step

    def __str__(self) -> str:
        parts = [f"{self.method} at {self.steps} steps", f"seed {self.seed}"]
        parts += [f"gamma {self.gamma:g}"] if self.gamma is not None else []
        parts += [f"omega {self.omega:g}"] if self.omega is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Results:
    """All rows of a comparison and what they were measured with.

    Attributes:
        title: of the report.
        rows: in the order in which tables show their methods.
        real: the same figures of real pictures.
        scale: figures of detail of real pictures and of blurred and noised copies, as `detail.detail_scale` gives.
        prompts: those the pictures were drawn from.
        settings: command, commit, n, seeds, hardware, training samples, budget and the like, as text.
        caveats: what a reader must know before the first figure.

    Raises:
        UserError: two rows are of the same method, step count, setting and seed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    title: str
    rows: tuple[Row, ...]
    real: dict[str, Figure] = field(default_factory=dict)
    scale: dict[str, dict[str, Figure]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[object, ...]] = set()
        for row in self.rows:
            key = (row.method, row.steps, row.gamma, row.omega, row.seed)
            if key in seen:
                raise UserError(f"there are two rows of {row}; keep one, or give the other its own seed")
            seen.add(key)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, in the order of the rows."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.figures))

    def of(self, group: Group, against: Against | None = None) -> list[str]:
        """Return the names of the metrics of a group, in the order of `metrics`."""
        return [name for name in self.metrics if any(f.is_of(group, against) for f in self._figures(name))]

    def identities(self, metric: str) -> tuple[Identity, ...]:
        """Return every distinct identity record of a metric, without the seed of its interval."""
        found = (figure.identity for figure in self._figures(metric))
        return tuple(dict.fromkeys(replace(identity, seed=None) for identity in found if identity))

    def floor(self, metric: str) -> float | None:
        """Return the figure of real pictures, else the mean floor of the rows' figures."""
        if metric in self.real:
            return self.real[metric].value
        floors = [figure.floor for figure in self._figures(metric) if figure.floor is not None]
        return sum(floors) / len(floors) if floors else None

    def _figures(self, metric: str) -> Iterable[Figure]:
        return (row.figures[metric] for row in self.rows if metric in row.figures)


def save_results(path: Path | str, results: Results) -> None:
    """Write results as JSON, one row a line, atomically."""
    rest = {name: value for name, value in asdict(results).items() if name != "rows"}
    head = json.dumps({"format": FORMAT, **rest}, indent=2, ensure_ascii=False).removesuffix("\n}")
    rows = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in results.rows)
    write_text(path, f'{head},\n  "rows": [\n{rows}\n  ]\n}}\n')


def load_results(path: Path | str) -> Results:
    """Read what `save_results` wrote.

    Raises:
        UserError: missing, not JSON, or not results.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path} does not hold results: its format is {found!r}, not {FORMAT!r}")
    try:
        return TypeAdapter(Results).validate_python({k: v for k, v in data.items() if k != "format"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} does not hold results: {where}: {first['msg']}") from error
