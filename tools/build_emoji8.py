"""Rebuild `world/emoji8`: contact sheets, concepts, pictures, splits and prompt lists, from pinned packages.

A developers' tool: users and tests never run it. It needs `npm` on the path and the
package `resvg-py` 0.5.0.

    python tools/build_emoji8.py --cache ~/.cache/fewstep-build --out world/emoji8

The hand-written files of the folder (README, ATTRIBUTION, LICENSES, synonyms, new_words) are left as they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from emoji8_sheets import draw, write_sheet
from emoji8_sources import SOURCES, Concept, collect
from emoji8_splits import make_records, prompt_lists
from fewstep.common.files import atomic_write, write_json
from fewstep_worlds.emoji8.dataset import SPLITS, Record


def write_text(out: Path, concepts: Sequence[Concept], records: Sequence[Record]) -> None:
    """Write all but the sheets: `sources.json`, `concepts.jsonl`, `pictures.jsonl` and the prompt lists."""
    write_json(out / "sources.json", {style: package.pin for style, package in SOURCES.items()})
    texts = ({"concept": concept.codepoint, **_without(vars(concept), "codepoint")} for concept in concepts)
    _write_lines(out / "concepts.jsonl", texts)
    _write_lines(out / "pictures.jsonl", (_sheet(style, records) for style in SOURCES))
    for name, prompts in prompt_lists(concepts, records).items():
        with atomic_write(out / "prompts" / f"{name}.txt") as part:
            part.write_text("\n".join(prompts) + "\n", encoding="utf-8")


def _sheet(style: str, records: Sequence[Record]) -> dict[str, object]:
    own = sorted((record for record in records if record.style == style), key=lambda record: record.tile)
    heldout = {split: [record.tile for record in own if record.split == split] for split in SPLITS[1:]}
    return {"style": style, "concepts": " ".join(record.concept for record in own), **heldout}


def _without(fields: Mapping[str, object], left_out: str) -> dict[str, object]:
    return {key: value for key, value in fields.items() if key != left_out}


def _write_lines(path: Path, items: Iterable[Mapping[str, object]]) -> None:
    lines = (json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items)
    with atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Rebuild the folder and print each sheet's size and mean PSNR."""
    parser = argparse.ArgumentParser(description="Rebuild world/emoji8 from pinned packages.")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewstep-build"), help="for the tarballs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "world" / "emoji8")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()

    concepts, artwork = collect(options.cache.expanduser())
    records = make_records(concepts, artwork)
    write_text(options.out, concepts, records)
    with multiprocessing.Pool(options.processes) as pool:
        for style, pictures in artwork.items():
            tiles = np.stack(pool.map(draw, pictures.values(), chunksize=16))
            path = options.out / f"{style}.webp"
            psnr = write_sheet(tiles, path)
            size = path.stat().st_size / 2**20
            print(f"{style:13s} {len(tiles):5d} pictures {size:6.2f} MiB {psnr:6.2f} dB", flush=True)
    print(f"{len(records)} pictures, {len(concepts)} concepts, {dict(Counter(r.split for r in records))}")


if __name__ == "__main__":
    main()
