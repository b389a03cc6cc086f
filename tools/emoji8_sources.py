"""Emoji-8's artwork and text: pinned packages, and the icon of each emoji in them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep_worlds.emoji8.dataset import STYLE_FAMILY

RENDER = 256
"""Edge in pixels at which vector artwork is drawn before it is reduced."""
LEFT_OUT_GROUPS = ("component", "symbols", "flags")


@dataclass(frozen=True)
class Package:
    """A pinned npm package and the sha256 of its tarball."""

    npm: str
    version: str
    sha256: str

    @property
    def pin(self) -> str:
        """Return name@version."""
        return f"{self.npm}@{self.version}"


SOURCES = {
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "fluent-color": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
}
CAPTIONS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
WITH_CODE_POINTS = ("noto", "twemoji", "fluent-flat")
"""Sets with a table of code points; the other SVG sets are matched by icon name."""


@dataclass(frozen=True)
class Concept:
    """One emoji of the core cut, with its CLDR text."""

    codepoint: str
    group: str
    name: str
    keywords: tuple[str, ...]
    name_zh: str
    keywords_zh: tuple[str, ...]


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's tarball, packed into `cache` if it is not there; refuse one with another hash."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{package.npm.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    if not path.is_file():
        command = ["npm", "pack", "--silent", package.pin]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{path}: sha256 is {found}, expected {package.sha256}; remove it and find out why")
    return path


def read_json_members(tarball: Path, *names: str) -> list[Any]:
    """Read JSON files of a tarball in one pass, in the order of `names`."""
    found: dict[str, Any] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.name in names:
                found[member.name] = json.load(_stream(archive, member))
    return [found[name] for name in names]


def _stream(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    stream = archive.extractfile(member)
    if stream is None:
        raise SystemExit(f"{member.name} is not a plain file")
    return stream


def normalise(codepoint: str) -> str:
    """Drop variation selector 16 and the zero-width joiner: the sets disagree about both."""
    return "-".join(part for part in codepoint.lower().split("-") if part not in ("fe0f", "200d"))


def slugify(label: str) -> str:
    """Return a label as icon sets name it: "man’s shoe" -> "mans-shoe"."""
    plain = unicodedata.normalize("NFKD", re.sub("[’']", "", label)).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def straight(text: str) -> str:
    """Return English text with the quotation marks of a keyboard."""
    return text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')


def read_concepts(tarball: Path) -> tuple[list[Concept], dict[str, str]]:
    """Return the core cut in CLDR order, and code point -> English label of every emoji, skin tones too."""
    english, chinese, names = read_json_members(
        tarball, "package/en/data.json", "package/zh/data.json", "package/meta/groups.json"
    )
    by_code = {entry["hexcode"]: entry for entry in chinese}
    labels: dict[str, str] = {}
    core: list[Concept] = []
    for entry in sorted(english, key=lambda item: item.get("order", 10**9)):
        for variant in (entry, *entry.get("skins", ())):
            labels[normalise(variant["hexcode"])] = variant["label"]
        if "group" not in entry or names["groups"][str(entry["group"])] in LEFT_OUT_GROUPS:
            continue
        zh = by_code[entry["hexcode"]]
        core.append(
            Concept(
                normalise(entry["hexcode"]),
                names["groups"][str(entry["group"])],
                straight(entry["label"]),
                tuple(straight(tag) for tag in entry.get("tags", ())),
                zh["label"],
                tuple(zh.get("tags", ())),
            )
        )
    return core, labels


def match_icons(sets: Mapping[str, tuple[Any, Any]], labels: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return style -> {code point: icon name} for the SVG sets.

    Sets without a table of code points are matched by the CLDR label's slug, then by the names and aliases of
    the sets that have one, then by both without hyphens, then by the character's own (never changing) Unicode
    name, which is what the oldest sets are named after.
    """
    by_label: dict[str, str] = {}
    for code, label in labels.items():
        by_label.setdefault(slugify(label), code)
    by_icon: dict[str, str] = {}
    matched: dict[str, dict[str, str]] = {}
    for style in WITH_CODE_POINTS:
        icons, characters = sets[style]
        known = {normalise(code): name for code, name in characters.items() if normalise(code) in labels}
        matched[style] = known
        for code, name in known.items():
            by_icon.setdefault(name, code)
        for alias, parent in _plain_aliases(icons):
            if parent in by_icon:
                by_icon.setdefault(alias, by_icon[parent])
    squeezed: dict[str, str] = {}
    for table in (by_label, by_icon):
        for name, code in table.items():
            squeezed.setdefault(_squeeze(name), code)
    single = (code for code in labels if "-" not in code)
    by_unicode = {_squeeze(unicodedata.name(chr(int(code, 16)), "")): code for code in single}
    by_unicode.pop("", None)
    matchers: tuple[Callable[[str], str | None], ...] = (
        by_label.get,
        by_icon.get,
        lambda name: squeezed.get(_squeeze(name)),
        lambda name: by_unicode.get(_squeeze(name)),
    )
    for style, (icons, _) in sets.items():
        if style not in matched:
            matched[style] = _match_by_name(icons, matchers)
    return matched


def _match_by_name(icons: Any, matchers: Sequence[Callable[[str], str | None]]) -> dict[str, str]:
    # An icon that refers to style classes which its package lacks would be drawn as a black silhouette.
    spellings = {
        name: [name]
        for name, icon in icons["icons"].items()
        if not icon.get("hidden") and not ("class=" in icon["body"] and "<style" not in icon["body"])
    }
    for alias, parent in _plain_aliases(icons):
        if parent in spellings:
            spellings[parent].append(alias)
    known: dict[str, str] = {}
    for match in matchers:
        done = set(known.values())
        for name, spelled in spellings.items():
            code = next((found for one in spelled if (found := match(one))), None)
            if name not in done and code is not None:
                known.setdefault(code, name)
    return known


def _plain_aliases(icons: Any) -> list[tuple[str, str]]:
    """Return (alias, icon) pairs, without those that also turn or mirror the picture."""
    aliases = icons.get("aliases", {})
    return [(alias, entry["parent"]) for alias, entry in aliases.items() if set(entry) == {"parent"}]


def _squeeze(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def svg_text(icons: Any, name: str) -> str:
    """Return an Iconify icon as an SVG document of RENDER x RENDER pixels."""
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{RENDER}" height="{RENDER}">{icon["body"]}</svg>'
    )


def collect(cache: Path) -> tuple[list[Concept], dict[str, dict[str, str | bytes]]]:
    """Return the concepts, and style -> {code point: SVG text or raster file} of the core cut."""
    concepts, labels = read_concepts(fetch(CAPTIONS, cache))
    core = [concept.codepoint for concept in concepts]
    sets = {}
    for style, source in SOURCES.items():
        if style != "fluent-3d":
            tarball = fetch(source, cache)
            icons, characters = read_json_members(tarball, "package/icons.json", "package/chars.json")
            sets[style] = (icons, characters)
    matched = match_icons(sets, labels)
    artwork: dict[str, dict[str, str | bytes]] = {
        style: {code: svg_text(icons, matched[style][code]) for code in core if code in matched[style]}
        for style, (icons, _) in sets.items()
    }
    # Pictures of the 3d package that neither Microsoft set has are of unstated origin.
    microsoft = set(core) & (set(matched["fluent-color"]) | set(matched["fluent-flat"]))
    files: dict[str, bytes] = {}
    with tarfile.open(fetch(SOURCES["fluent-3d"], cache)) as archive:
        for member in archive:
            code = normalise(Path(member.name).stem)
            if member.name.endswith(".webp") and code in microsoft:
                files[code] = _stream(archive, member).read()
    artwork["fluent-3d"] = {code: files[code] for code in core if code in files}
    return concepts, {style: artwork[style] for style in STYLE_FAMILY}
