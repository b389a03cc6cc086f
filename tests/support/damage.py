"""Damaged and odd inputs, made by seeded generators. Not a test.

A `Damage` changes a copy of an input in place. Every generator yields all its damages of a file; `some` draws as
many as a test has time for, always the same ones.
"""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEED = 26


@dataclass(frozen=True)
class Damage:
    """A change of a folder or file, by name.

    Attributes:
        means: whether it means the undamaged input, whatever diffusers makes of it.
    """

    name: str
    apply: Callable[[Path], None]
    means: bool = False


def some(damages: Iterable[Damage], count: int, seed: int = SEED) -> list[Damage]:
    """Draw `count` of the damages, in their order."""
    every = list(damages)
    chosen = sorted(random.Random(f"{seed} {every[0].name}").sample(range(len(every)), min(count, len(every))))
    return [every[i] for i in chosen]


# ---- text


def _rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return apply


def _as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def flipped(data: bytes, name: str, count: int, low: int = 0, high: int | None = None) -> bytes:
    """Change one bit of `count` bytes between two places."""
    made, chance = bytearray(data), random.Random(f"{SEED} {name}")
    for _ in range(count):
        place = chance.randrange(low, min(high or len(made), len(made)))
        made[place] ^= 1 << chance.randrange(8)
    return bytes(made)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda held: b"",
    "half": lambda held: held[: len(held) // 2],
    "last byte gone": lambda held: held.rstrip()[:-1],
    "byte order mark": lambda held: b"\xef\xbb\xbf" + held,
    "UTF-16": lambda held: held.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda held: held.decode().encode("utf-16-le"),
    "Latin-1": lambda held: held.replace(b"e", b"\xe9", 1),
    "CRLF": lambda held: held.replace(b"\n", b"\r\n"),
    "CR": lambda held: held.replace(b"\n", b"\r"),
    "no line end": lambda held: held.rstrip(b"\n"),
    "blank lines": lambda held: b"\n\n" + held + b"\n\n",
    "zero bytes": lambda held: held + b"\0\0\0",
    "a byte flipped": lambda held: flipped(held, "text", 1),
    "eight bytes flipped": lambda held: flipped(held, "texts", 8),
}
"""What happens to any text file."""
FILES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "a folder": _as_folder,
    "a dangling link": _dangling,
}
"""What happens to any file."""


def file_damages(place: str, changes: dict[str, Callable[[bytes], bytes]] | None = None) -> Iterator[Damage]:
    """Damage a file below the root as bytes, and as a file."""

    def at(change: Callable[[Path], None]) -> Callable[[Path], None]:
        return lambda root: change(root / place)

    for name, change in (BYTES if changes is None else changes).items():
        yield Damage(f"{place}: {name}", at(_rewrite(change)))
    for name, turn in FILES.items():
        yield Damage(f"{place}: {name}", at(turn))


# ---- JSON

Change = Callable[[Any], Any]


def other_values(value: Any) -> dict[str, Any]:
    """Values of other types, and others of the same type, by name."""
    found: dict[str, Any] = {"null": None}
    if isinstance(value, bool):
        found |= {"flipped": not value, "as text": str(value).lower(), "as a number": int(value), "as a list": [value]}
    elif isinstance(value, int):
        found |= {"as text": str(value), "as a fraction": value + 0.5, "negative": -value - 1, "zero": 0}
        found |= {"doubled": value * 2, "one more": value + 1, "huge": 10**9, "as a list": [value, value], "true": True}
    elif isinstance(value, float):
        found |= {"as text": str(value), "negative": -value, "zero": 0, "doubled": value * 2, "huge": 1e30}
        found |= {"as a list": [value], "not a number": float("nan")}
    elif isinstance(value, str):
        found |= {
            "another word": f"{value}x",
            "a number": 3,
            "as a list": [value],
            "empty": "",
            "upper case": value.upper(),
        }
    elif isinstance(value, list):
        found |= {
            "its first": value[0] if value else 0,
            "backwards": value[::-1],
            "none": [],
            "one more": value + value[-1:],
        }
        found |= {
            "one less": value[:-1],
            "as texts": [str(item) for item in value],
            "as a mapping": dict.fromkeys(map(str, value), 1),
        }
    elif isinstance(value, dict):
        found |= {"none": {}, "as a list": list(value), "as text": "x"}
    else:
        found |= {"a number": 1, "a fraction": 0.5, "text": "x", "true": True, "a list": [1, 2]}
    return {name: other for name, other in found.items() if type(other) is not type(value) or other != value}


def _set(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**data, key: value}


WHOLE_JSON: dict[str, Callable[[str], str]] = {
    "a list": lambda text: f"[{text}]",
    "null": lambda text: "null",
    "text": lambda text: '"x"',
    "no keys": lambda text: "{}",
    "a comma too many": lambda text: text.rstrip()[:-1].rstrip() + ",\n}",
    "a comment": lambda text: "// made by hand\n" + text,
    "single quotes": lambda text: text.replace('"', "'"),
    "keys twice": lambda text: text.rstrip()[:-1].rstrip() + "," + text.lstrip()[1:],
    "two objects": lambda text: text + text,
    "deep": lambda text: '{"a":' * 5000 + "1" + "}" * 5000,
}


def json_damages(root: Path, place: str, *, keys: bool = True) -> Iterator[Damage]:
    """Damage a JSON file of an undamaged root: each key gone, null, of other types and values; the whole; its bytes."""
    known = json.loads((root / place).read_text(encoding="utf-8"))

    def rewritten(change: Change) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            data = json.loads((folder / place).read_text(encoding="utf-8"))
            (folder / place).write_text(json.dumps(change(copy.deepcopy(data)), indent=2), encoding="utf-8")

        return apply

    def by_text(change: Callable[[str], str]) -> Callable[[Path], None]:
        return lambda folder: (
            (folder / place).write_text(change((folder / place).read_text()), encoding="utf-8") and None
        )  # type: ignore[func-returns-value]

    if keys and isinstance(known, dict):
        for key, value in known.items():
            yield Damage(
                f"{place}: {key} gone", rewritten(lambda data, key=key: {k: v for k, v in data.items() if k != key})
            )
            yield Damage(
                f"{place}: {key} misspelt",
                rewritten(lambda data, key=key: {f"{k}_" if k == key else k: v for k, v in data.items()}),
            )
            for name, other in other_values(value).items():
                yield Damage(
                    f"{place}: {key} {name}", rewritten(lambda data, key=key, other=other: _set(data, key, other))
                )
        for name, other in {"number": 7, "text": "x", "mapping": {"a": [1]}, "null": None}.items():
            yield Damage(
                f"{place}: unknown {name}", rewritten(lambda data, other=other: _set(data, "made_up_key", other))
            )
    for name, change in WHOLE_JSON.items():
        yield Damage(f"{place}: {name}", by_text(change))
    yield from file_damages(place)


# ---- tensors


def _tensors(
    change: Callable[[dict[str, Tensor], random.Random], dict[str, Tensor]], name: str
) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as held:
            metadata = held.metadata()
        tensors = change(load_file(file), random.Random(f"{SEED} {name}"))
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)

    return apply


def _one(
    tensors: dict[str, Tensor], chance: random.Random, change: Callable[[Tensor], Tensor], wide: bool = True
) -> dict[str, Tensor]:
    key = chance.choice(sorted(key for key, value in tensors.items() if value.dim() > 1 or not wide))
    return {**tensors, key: change(tensors[key])}


def _without_one(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    gone = chance.choice(sorted(tensors))
    return {key: value for key, value in tensors.items() if key != gone}


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        made = tensor.clone()
        made.view(-1)[0] = value
        return made

    return change


TENSORS: dict[str, Callable[[dict[str, Tensor], random.Random], dict[str, Tensor]]] = {
    "one gone": _without_one,
    "all gone": lambda held, chance: {},
    "one misspelt": lambda held, chance: {f"{k}x" if i == 3 else k: v for i, (k, v) in enumerate(held.items())},
    "one more": lambda held, chance: {**held, "made_up.weight": torch.ones(2, 2)},
    "one more, empty": lambda held, chance: {**held, "made_up": torch.ones(0)},
    "prefixed": lambda held, chance: {f"model.{k}": v for k, v in held.items()},
    "one transposed": lambda held, chance: _one(held, chance, lambda v: v.transpose(0, 1)),
    "one wider": lambda held, chance: _one(held, chance, lambda v: torch.cat([v, v])),
    "one flat": lambda held, chance: _one(held, chance, lambda v: v.flatten()),
    "one with one more axis": lambda held, chance: _one(held, chance, lambda v: v[None]),
    "not a number in one": lambda held, chance: _one(held, chance, _filled(float("nan"))),
    "infinity in one": lambda held, chance: _one(held, chance, _filled(float("inf"))),
    "one zero": lambda held, chance: _one(held, chance, torch.zeros_like),
    "one huge": lambda held, chance: _one(held, chance, lambda v: v * 1e30),
    "one in fp16": lambda held, chance: _one(held, chance, lambda v: v.half()),
    "one in whole numbers": lambda held, chance: _one(held, chance, lambda v: (v * 10).to(torch.int32)),
    "one in fp8": lambda held, chance: _one(held, chance, lambda v: v.to(torch.float8_e4m3fn)),
    "all in fp16": lambda held, chance: {k: v.half() for k, v in held.items()},
    "all in bf16": lambda held, chance: {k: v.bfloat16() for k, v in held.items()},
    "all in fp64": lambda held, chance: {k: v.double() for k, v in held.items()},
    "all in fp8": lambda held, chance: {k: v.to(torch.float8_e4m3fn) for k, v in held.items()},
    "all in bytes": lambda held, chance: {k: (v * 10).to(torch.int8) for k, v in held.items()},
    "all in truth values": lambda held, chance: {k: v > 0 for k, v in held.items()},
}


NUMBERS = ("one transposed", "one zero", "one huge", "not a number in one", "infinity in one", "its numbers flipped")
"""Changes of numbers alone: names, types and shapes stay. Without a digest they cannot be detected."""


def _header(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    """Rewrite the JSON at the head of a safetensors file."""

    def apply(held: bytes) -> bytes:
        length = int.from_bytes(held[:8], "little")
        made = json.dumps(change(json.loads(held[8 : 8 + length]))).encode()
        made += b" " * (-len(made) % 8)
        return len(made).to_bytes(8, "little") + made + held[8 + length :]

    return apply


def _first(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    def in_header(header: dict[str, Any]) -> dict[str, Any]:
        key = next(key for key in header if key != "__metadata__")
        return {**header, key: change(header[key])}

    return _header(in_header)


WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda held: b"",
    "half": lambda held: held[: len(held) // 2],
    "last byte gone": lambda held: held[:-1],
    "a byte too many": lambda held: held + b"\0",
    "its length flipped": lambda held: flipped(held, "length", 1, 0, 8),
    "its length huge": lambda held: b"\xff" * 8 + held[8:],
    "its header flipped": lambda held: flipped(held, "header", 1, 8, 400),
    "its header flipped again": lambda held: flipped(held, "header again", 3, 8, 4000),
    "its numbers flipped": lambda held: flipped(held, "numbers", 3, len(held) // 2),
    "a pickle": lambda held: b"PK\x03\x04" + held,
    "a page of a hub": lambda held: b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": lambda held: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
    "no metadata": _header(lambda header: {k: v for k, v in header.items() if k != "__metadata__"}),
    "metadata of another tool": _header(lambda header: {**header, "__metadata__": {"format": "tf"}}),
    "metadata of numbers": _header(lambda header: {**header, "__metadata__": {"format": 3}}),
    "an unknown type": _first(lambda entry: {**entry, "dtype": "F7"}),
    "a negative shape": _first(lambda entry: {**entry, "shape": [-1]}),
    "a shape of texts": _first(lambda entry: {**entry, "shape": ["8"]}),
    "places that overlap": _first(lambda entry: {**entry, "data_offsets": [0, 10**9]}),
    "an entry without a shape": _first(lambda entry: {k: v for k, v in entry.items() if k != "shape"}),
}


def weight_damages(place: str) -> Iterator[Damage]:
    """Damage a safetensors file below the root: its tensors, its header, its bytes."""

    def at(change: Callable[[Path], None]) -> Callable[[Path], None]:
        return lambda root: change(root / place)

    for name, change in TENSORS.items():
        yield Damage(f"{place}: {name}", at(_tensors(change, f"{place} {name}")))
    yield from file_damages(place, WEIGHTS)
    for name, target in {"of another precision": ".fp16", "by another name": ".ema"}.items():
        yield Damage(
            f"{place}: {name}",
            lambda root, end=target: (root / place).rename((root / place).with_suffix(f"{end}.safetensors")) and None,  # type: ignore[func-returns-value,misc]
        )


def folder_damages(root: Path) -> Iterator[Damage]:
    """Damage every file of a pipeline folder."""
    for file in sorted(root.rglob("*")):
        place = str(file.relative_to(root))
        if file.suffix == ".json":
            yield from json_damages(root, place, keys=file.name not in ("vocab.json", "tokenizer.json"))
        elif file.suffix == ".safetensors":
            yield from weight_damages(place)
        elif file.suffix == ".txt":
            yield from file_damages(place)


# ---- LoRAs


def lora_weights(shapes: dict[str, tuple[int, ...]], rank: int = 4) -> dict[str, Tensor]:
    """A LoRA of a UNet's attention and first convolutions that shows in pictures, in diffusers' names."""
    noise = torch.Generator().manual_seed(SEED)
    made = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith((".to_q", ".to_v", ".conv1")) and name.endswith(".weight"):
            made[f"unet.{module}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=noise) * 0.3
            made[f"unet.{module}.lora_B.weight"] = (
                torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=noise) * 0.3
            )
    return made


def _renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {change(key): value for key, value in held.items()}


def _kohya(held: dict[str, Tensor], start: str = "lora_unet_", alpha: float | None = 2.0) -> dict[str, Tensor]:
    made = {}
    for key, value in held.items():
        module, _, end = key.removeprefix("unet.").partition(".lora_")
        name = start + module.replace(".", "_")
        made[f"{name}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = value
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def _of_layer(
    held: dict[str, Tensor], change: Callable[[str, str, Tensor, Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    a = min(key for key in held if key.endswith("to_q.lora_A.weight"))
    b = a.replace("lora_A", "lora_B")
    return {key: value for key, value in held.items() if key not in (a, b)} | change(a, b, held[a], held[b])


LORAS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "as trained": lambda held: held,
    "without the component's name": _renamed(lambda key: key.removeprefix("unet.")),
    "in PEFT's names": _renamed(lambda key: key.replace("unet.", "base_model.model.")),
    "in PEFT's names behind the component's": _renamed(lambda key: key.replace("unet.", "unet.base_model.model.")),
    "with an adapter's name inside": _renamed(lambda key: key.replace(".weight", ".default.weight")),
    "before PEFT": _renamed(lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")),
    "as linear layers": _renamed(
        lambda key: key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")
    ),
    "in kohya's names": _kohya,
    "in kohya's names without alpha": lambda held: _kohya(held, alpha=None),
    "in LyCORIS' names": lambda held: _kohya(held, "lycoris_", None),
    "for a transformer": _renamed(lambda key: key.replace("unet.", "transformer.")),
    "of a prior network": _renamed(lambda key: key.replace("unet.", "prior.")),
    "with a text encoder's layer": lambda held: {
        **held,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
    },
    "with a magnitude (DoRA)": lambda held: _of_layer(
        held,
        lambda a, b, down, up: {
            a: down,
            b: up,
            a.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(len(up)),
        },
    ),
    "with a bias": lambda held: _of_layer(
        held, lambda a, b, down, up: {a: down, b: up, b.replace("weight", "bias"): torch.ones(len(up))}
    ),
    "without a B": lambda held: _of_layer(held, lambda a, b, down, up: {a: down}),
    "without an A": lambda held: _of_layer(held, lambda a, b, down, up: {b: up}),
    "with A and B exchanged": lambda held: _of_layer(held, lambda a, b, down, up: {a: up, b: down}),
    "with ranks apart": lambda held: _of_layer(held, lambda a, b, down, up: {a: down[:2], b: up}),
    "with a layer of rank 2": lambda held: _of_layer(held, lambda a, b, down, up: {a: down[:2], b: up[:, :2]}),
    "of rank 0": lambda held: _of_layer(held, lambda a, b, down, up: {a: down[:0], b: up[:, :0]}),
    "with a linear layer as a convolution": lambda held: _of_layer(
        held, lambda a, b, down, up: {a: down[..., None, None], b: up[..., None, None]}
    ),
    "for a wider network": lambda held: _of_layer(held, lambda a, b, down, up: {a: torch.cat([down, down], 1), b: up}),
    "with a layer that is nowhere": lambda held: {
        **held,
        "unet.mid_block.attentions.7.to_q.lora_A.weight": torch.ones(4, 32),
        "unet.mid_block.attentions.7.to_q.lora_B.weight": torch.ones(32, 4),
    },
    "in upper case": _renamed(str.upper),
}
"""Layouts of the LoRA files of other trainers, and invalid ones."""
SPELLED = (
    *("without the component's name", "in PEFT's names", "in PEFT's names behind the component's"),
    *("with an adapter's name inside", "in LyCORIS' names"),
)
"""Those of the same LoRA that diffusers draws without, in silence, or does not read."""


def _adapter(**more: Any) -> dict[str, str]:
    """The metadata by which diffusers keeps an adapter's config."""
    own = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "conv1"], **more}
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in own.items()})}


NOTES: dict[str, dict[str, str]] = {
    "an alpha": _adapter(lora_alpha=2),
    "an alpha as text": _adapter(lora_alpha="2"),
    "an alpha of 0": _adapter(lora_alpha=0),
    "a negative alpha": _adapter(lora_alpha=-2),
    "an alpha of null": _adapter(lora_alpha=None),
    "an alpha as a list": _adapter(lora_alpha=[2]),
    "a stabilised rank": _adapter(use_rslora=True),
    "an alpha by layers": _adapter(alpha_pattern={"to_q": 1}),
    "an alpha by a pattern": _adapter(alpha_pattern={".*attn1.to_q": 1}),
    "a broken pattern": _adapter(alpha_pattern={"[": 1}),
    "a rank by layers": _adapter(rank_pattern={"to_q": 4}),
    "another rank": _adapter(r=8),
    "a rank as text": _adapter(r="4"),
    "DoRA": _adapter(use_dora=True),
    "unknown words": _adapter(made_up=1),
    "no targets": _adapter(target_modules=None),
    "alphas of no mapping": {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.alpha_pattern": [1]})},
    "broken metadata": {"lora_adapter_metadata": "{"},
    "a list for metadata": {"lora_adapter_metadata": "[1]"},
    "a broken record of ours": {"fewstep": "{"},
    "a record of a number": {"fewstep": "3"},
    "a record with a number for sampling": {"fewstep": json.dumps({"sampling": 3})},
    "a record of an unknown sampler": {"fewstep": json.dumps({"sampling": {"sampler": "magic"}})},
    "a record of another base": {"fewstep": json.dumps({"base": "0" * 64})},
    "a record of a base that is a number": {"fewstep": json.dumps({"base": 3})},
    "a record of times that are text": {"fewstep": json.dumps({"times": ["x"], "sigmas": ["y"]})},
    "a record of another prediction": {"fewstep": json.dumps({"prediction": "v"})},
    "kohya's words": {"ss_network_alpha": "2", "ss_network_dim": "4"},
}
"""Damages of a LoRA file's header."""


def lora_damages(place: str) -> Iterator[Damage]:
    """Write a LoRA in other names, with other notes; damage its file as any other of weights."""

    def written(
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]], notes: dict[str, str]
    ) -> Callable[[Path], None]:
        def apply(root: Path) -> None:
            save_file(
                {k: v.contiguous() for k, v in change(load_file(root / place)).items()},
                root / place,
                {"format": "pt", **notes},
            )

        return apply

    for name, change in LORAS.items():
        yield Damage(f"{place}: {name}", written(change, {}), means=name in SPELLED)
    for name, notes in NOTES.items():
        yield Damage(f"{place}: {name}", written(lambda held: held, notes))
    yield from weight_damages(place)


# ---- pictures with captions, in folders and in shards

Files = dict[str, bytes]
"""Names below the top of a folder or shard -> what the files hold."""
CAPTIONS = {
    name: f"a {word} ring number {i}" for i, (name, word) in enumerate(zip("abcd", ("red", "green", "blue", "grey")))
}
"""Captions of the undamaged pictures, by their names."""
SIDE = 64


def pixels(name: str) -> np.ndarray:
    """An undamaged picture, uint8 [64, 64, 3]: smooth, with a corner that marks its orientation."""
    y, x = np.mgrid[:SIDE, :SIDE]
    shade = 40 * "abcd".index(name)
    made = np.stack([x * 3 + shade // 2, y * 2 + shade, 200 - x - y + shade], axis=-1).clip(0, 255).astype(np.uint8)
    made[:16, :16] = (250, 20, 20 + shade)
    return made


def picture(array: np.ndarray, form: str = "PNG", mode: str = "RGB", **more: Any) -> bytes:
    """A picture file in memory."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(array).convert(mode).save(held, form, **more)
    return held.getvalue()


def undamaged() -> Files:
    """Four pictures with captions beside them."""
    found: Files = {}
    for name, captions in CAPTIONS.items():
        found |= {f"{name}.png": picture(pixels(name)), f"{name}.txt": f"{captions}\n".encode()}
    return found


def _listing(**rows: Any) -> bytes:
    """A metadata.jsonl of the four pictures, whose row for b is another one, or text."""
    lines = []
    for name, captions in CAPTIONS.items():
        row = rows.get(name, {"file_name": f"{name}.png", "text": captions})
        lines.append(row if isinstance(row, str) else json.dumps(row))
    return "".join(f"{line}\n" for line in lines).encode()


@dataclass(frozen=True)
class DataDamage:
    """A change of some pictures and captions: of picture b or its caption, or of how all are named.

    Attributes:
        captions: those of b that are right; None where there are none.
        near: whether b's pixels must be near the undamaged ones; else those that Pillow reads.
        grey: whether they are in shades of grey.
    """

    name: str
    change: Callable[[Files], Files]
    captions: tuple[str, ...] | None = (CAPTIONS["b"],)
    near: bool = True
    grey: bool = False


def as_text(held: bytes) -> str | None:
    """What text is in a file, by Python's own codecs; None for none."""
    for mark, codec in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8-sig")):
        if held.startswith(mark):
            try:
                text = held.decode(codec)
            except UnicodeDecodeError:
                return None
            return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n")
    return None


def _with(held: Files, gone: str = "", **files: bytes) -> Files:
    kept = {name: data for name, data in held.items() if name not in gone.split()}
    return kept | {name.replace("_dot_", "."): data for name, data in files.items()}


def _shape(form: str, mode: str, suffix: str, **more: Any) -> Callable[[Files], Files]:
    def change(held: Files) -> Files:
        return _with(held, "b.png") | {f"b{suffix}": picture(pixels("b"), form, mode, **more)}

    return change


def _deep(held: Files) -> Files:
    from PIL import Image

    grey = np.asarray(Image.fromarray(pixels("b")).convert("L")).astype(np.uint16) * 257
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return held | {"b.png": file.getvalue()}


def _turned(held: Files) -> Files:
    from PIL import Image

    note = Image.Exif()
    note[0x0112] = 6  # the camera lay on its side
    turned = np.ascontiguousarray(np.rot90(pixels("b")))
    return _with(held, "b.png") | {"b.jpg": picture(turned, "JPEG", exif=note, quality=95)}


def _moving(held: Files) -> Files:
    from PIL import Image

    frames = [Image.fromarray(pixels(name)) for name in "bc"]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return _with(held, "b.png") | {"b.webp": file.getvalue()}


def _seen(change: Callable[[bytes], bytes], name: str) -> Callable[[Files], Files]:
    return lambda held: held | {name: change(held[name])}


def _caption(held: bytes) -> tuple[str, ...] | None:
    text = (as_text(held) or "").strip()
    return (text,) if text else None


PICTURES: dict[str, DataDamage] = {
    damage.name: damage
    for damage in [
        DataDamage("a picture as JPEG", _shape("JPEG", "RGB", ".jpg", quality=95)),
        DataDamage("a picture as JPEG by the suffix .JPG", _shape("JPEG", "RGB", ".JPG", quality=95)),
        DataDamage("a picture as JPEG named .png", _shape("JPEG", "RGB", ".png", quality=95)),
        DataDamage("a picture as PNG named .jpg", _shape("PNG", "RGB", ".jpg")),
        DataDamage("a picture in CMYK", _shape("JPEG", "CMYK", ".jpg", quality=95)),
        DataDamage("a picture as WebP", _shape("WEBP", "RGB", ".webp", lossless=True)),
        DataDamage("a picture as BMP", _shape("BMP", "RGB", ".bmp")),
        DataDamage("a picture as TIFF", _shape("TIFF", "RGB", ".tif")),
        DataDamage("a picture as GIF", _shape("GIF", "P", ".gif"), near=False),
        DataDamage("a picture of a palette", _shape("PNG", "P", ".png"), near=False),
        DataDamage("a picture with alpha", _shape("PNG", "RGBA", ".png")),
        DataDamage("a grey picture", _shape("PNG", "L", ".png"), grey=True),
        DataDamage("a grey picture with alpha", _shape("PNG", "LA", ".png"), grey=True),
        DataDamage("a picture of 16 bits", _deep, grey=True),
        DataDamage("a picture that lies on its side", _turned),
        DataDamage("a picture that moves", _moving),
        DataDamage("a picture of no known kind", lambda held: _with(held, "b.png") | {"b.heic": held["b.png"]}, None),
        DataDamage("an empty picture", _seen(lambda data: b"", "b.png"), None),
        DataDamage("half a picture", _seen(lambda data: data[: len(data) // 2], "b.png"), None),
        DataDamage("a picture without its end", _seen(lambda data: data[:-8], "b.png")),
        DataDamage("a page for a picture", _seen(lambda data: b"<html></html>", "b.png"), None),
        *(
            DataDamage(
                f"a picture with {n} bits flipped",
                _seen(lambda data, n=n: flipped(data, f"{n}", n), "b.png"),
                near=False,
            )
            for n in (1, 2, 5)
        ),
        DataDamage(
            "a JPEG with bits flipped",
            lambda held: _with(held, "b.png") | {"b.jpg": flipped(picture(pixels("b"), "JPEG"), "jpeg", 3, 200)},
            near=False,
        ),
        DataDamage("a picture without caption", lambda held: _with(held, "b.txt"), None),
        DataDamage("a caption without picture", lambda held: _with(held, "b.png"), None),
        DataDamage(
            "names with dots",
            lambda held: _with(held, "b.png b.txt") | {"b.v1.5.png": held["b.png"], "b.v1.5.txt": held["b.txt"]},
        ),
        DataDamage(
            "names with blanks",
            lambda held: _with(held, "b.png b.txt") | {" b (1).png": held["b.png"], " b (1).txt": held["b.txt"]},
        ),
        DataDamage(
            "names of other letters",
            lambda held: _with(held, "b.png b.txt") | {"ü猫.png": held["b.png"], "ü猫.txt": held["b.txt"]},
        ),
        DataDamage(
            "suffixes in capitals",
            lambda held: _with(held, "b.png b.txt") | {"b.PNG": held["b.png"], "b.TXT": held["b.txt"]},
        ),
        DataDamage(
            "a folder below",
            lambda held: _with(held, "b.png b.txt") | {"more/b.png": held["b.png"], "more/b.txt": held["b.txt"]},
        ),
        DataDamage(
            "hidden", lambda held: _with(held, "b.png b.txt") | {".b.png": held["b.png"], ".b.txt": held["b.txt"]}, None
        ),
        DataDamage(
            "beside what systems leave",
            lambda held: held | {"__MACOSX/._b.png": b"x", ".DS_Store": b"x", "Thumbs.db": b"x"},
        ),
        *(
            DataDamage(
                f"a caption: {name}",
                _seen(change, "b.txt"),
                _caption(change(f"{CAPTIONS['b']}\n".encode())),
            )
            for name, change in BYTES.items()
        ),
        *(
            DataDamage(
                f"a JSON caption: {name}",
                lambda held, row=row: _with(held, "b.txt") | {"b.json": json.dumps(row).encode()},
                captions,
            )
            for name, row, captions in (
                ("caption", {"caption": CAPTIONS["b"]}, (CAPTIONS["b"],)),
                ("text", {"text": f" {CAPTIONS['b']} "}, (CAPTIONS["b"],)),
                ("several", {"captions": [CAPTIONS["b"], "b"]}, (CAPTIONS["b"], "b")),
                ("a number", {"caption": 3}, None),
                ("nothing", {"caption": None}, None),
                ("no text", {"label": "b"}, None),
                ("a list", [CAPTIONS["b"]], (CAPTIONS["b"],)),
            )
        ),
    ]
}


def _listed(name: str, row: Any, captions: tuple[str, ...] | None = (CAPTIONS["b"],), **more: Any) -> DataDamage:
    """The four pictures by a list, whose line for b is this one."""

    def change(held: Files) -> Files:
        kept = {file: data for file, data in held.items() if not file.endswith(".txt")}
        return kept | {"metadata.jsonl": _listing(b=row)} | more.get("files", {})

    return DataDamage(f"a list: {name}", change, captions)


B = {"file_name": "b.png", "text": CAPTIONS["b"]}
LISTED = [
    _listed("as it should be", B),
    _listed("other keys too", {**B, "width": 64, "tags": ["x"], "conditions": {"a": 1}}),
    _listed(
        "several lines for one picture", json.dumps(B) + "\n" + json.dumps({**B, "text": "b"}), (CAPTIONS["b"], "b")
    ),
    _listed("several texts", {"file_name": "b.png", "text": [CAPTIONS["b"], "b"]}, (CAPTIONS["b"], "b")),
    _listed("a blank line", json.dumps(B) + "\n\n"),
    _listed("a text of several lines", {**B, "text": "one\ntwo"}, ("one\ntwo",)),
    _listed(
        "an inner line separator", json.dumps({**B, "text": "one\u2028two"}, ensure_ascii=False), ("one\u2028two",)
    ),
    _listed("an escaped picture emoji", {**B, "text": "cat \U0001f600"}, ("cat \U0001f600",)),
    _listed("no line for it", "", None),
    _listed("no text", {"file_name": "b.png"}, None),
    _listed("an empty text", {**B, "text": " "}, None),
    _listed("null for text", {**B, "text": None}, None),
    _listed("a number for text", {**B, "text": 3}, None),
    _listed("a mapping for text", {**B, "text": {"en": "b"}}, None),
    _listed("no name", {"text": CAPTIONS["b"]}, None),
    _listed("a number for a name", {**B, "file_name": 3}, None),
    _listed("a name that is nowhere", {**B, "file_name": "e.png"}, None),
    _listed("a name with a dot", {**B, "file_name": "./b.png"}),
    _listed("a name that leads out", {**B, "file_name": "../b.png"}, None),
    _listed("a whole path", {**B, "file_name": "/etc/hosts"}, None),
    _listed("a name of a folder", {**B, "file_name": "."}, None),
    _listed("another kind of slash", {**B, "file_name": ".\\b.png"}),
    _listed("half a line", json.dumps(B)[:20], None),
    _listed("a comma behind the line", json.dumps(B) + ","),
    _listed("a list for a line", [1], None),
    _listed("a text for a line", '"b"', None),
    _listed("a key twice", '{"file_name": "b.png", "text": "x", "text": "y"}', None),
    _listed("not a number", '{"file_name": "b.png", "text": NaN}', None),
    _listed("deep", '{"file_name": "b.png", "text": ' + "[" * 3000 + "]" * 3000 + "}", None),
]
WHOLE_LISTS = [
    DataDamage(
        f"a list: {name}",
        lambda held, change=change: (
            {k: v for k, v in held.items() if not k.endswith(".txt")} | {"metadata.jsonl": change(_listing())}
        ),
        (CAPTIONS["b"],),
    )
    for name, change in BYTES.items()
    if "flipped" not in name and name != "Latin-1"
]
"""The same for the list as a whole; what is not right must be refused."""


def data_damages() -> list[DataDamage]:
    """All damages of pictures and captions."""
    return [*PICTURES.values(), *LISTED, *WHOLE_LISTS]


# ---- text of other kinds

PROMPTS = "a red ring\na blue disc, on white\n\n  a cat \U0001f600 é  \n"


def prompt_damages() -> Iterator[tuple[str, bytes, list[str] | None]]:
    """A prompt file as (name, bytes, the prompts in it, or None for no text)."""
    plain = PROMPTS.encode()
    more: dict[str, Callable[[bytes], bytes]] = {
        "inner separators": lambda held: "one\u2028two\x85three\x0cfour\n".encode(),
        "tabs": lambda held: b"a\tb\n\tc\n",
        "UTF-16 of the other order": lambda held: b"\xfe\xff" + held.decode().encode("utf-16-be"),
        "a mark in each line": lambda held: b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n",
        "Shift JIS": lambda held: "赤い猫".encode("shift-jis"),
        "Latin-1 accents": lambda held: "é".encode("latin-1"),
        "blanks alone": lambda held: b" \n\t\n",
    }
    for name, change in {**BYTES, **more}.items():
        held = change(plain)
        text = as_text(held)
        lines = [line.lstrip("\ufeff").strip() for line in (text or "").split("\n")]
        yield name, held, [line for line in lines if line] if text is not None else None


WRONG = object()
"""The meaning of a setting that has none."""


def setting_damages() -> Iterator[tuple[str, str, Any]]:
    """Settings as people write them, as (key, text, the value that is meant, or `WRONG` where there is none)."""
    for text, value in {
        **{
            "0.001": 1e-3,
            "1e-3": 1e-3,
            "1E-3": 1e-3,
            "1.0e-3": 1e-3,
            ".001": 1e-3,
            "+0.5": 0.5,
            "1": 1.0,
            "'0.5'": 0.5,
        },
        **dict.fromkeys(
            ("nan", ".nan", "inf", ".inf", "-1e-3", "0", "1,5", "1e-3x", "", "null", "true", "[1e-3]"), WRONG
        ),
        **dict.fromkeys(("1:30", "2024-01-02", "{a: 1}", "yes", "0.001 0.002"), WRONG),
    }.items():
        yield "optim.lr", text, value
    for text, value in {
        **{"8": 8, "+8": 8, "8.0": 8, "0x10": 16, "'8'": 8, "8 # eight": 8, " 8 ": 8},
        **dict.fromkeys(
            ("8.5", "-8", "0", "eight", "8,8", "[8]", "1:30", "true", "null", "1e-3", "yes", "8px", "²"), WRONG
        ),
    }.items():
        yield "loop.batch", text, value
    for text, value in {
        **{"true": True, "True": True, "TRUE": True, "false": False, "False": False},
        **dict.fromkeys(("maybe", "2", "null", "[true]", "{}", "truee"), WRONG),
    }.items():
        yield "student.checkpointing", text, value
    for text in (
        "2024",
        "010",
        "1:30",
        "yes",
        "no",
        "null_",
        "2024-01-02",
        "1e3",
        "~/pics",
        "C:\\pics",
        "a b",
        "ü猫",
        "0x10",
        "true",
    ):
        yield "data.source", text, text
    for text, value in {"'2024'": "2024", '"a: b"': "a: b"}.items():
        yield "data.source", text, value
    for text, value in {
        **{"lcm": "lcm", " lcm ": "lcm", '"lcm"': "lcm"},
        **dict.fromkeys(("LCM", "lcmx", "3", "[lcm]", "null", "{lcm: 1}", "", "true"), WRONG),
    }.items():
        yield "method.guidance.convention", text, value
    for text, value in {
        **{"[to_q, to_k]": ("to_q", "to_k"), "[to_q]": ("to_q",), "null": None, "[]": ()},
        **dict.fromkeys(("3", "{to_q: 1}", "[[to_q]]", "[to_q", "[null]"), WRONG),
    }.items():
        yield "student.targets", text, value
    for key in (
        "optim.lrr",
        "optim.lr.x",
        "optm.lr",
        "loop",
        "",
        ".",
        "optim.",
        "optim..lr",
        "0",
        "__class__",
        "optim.__dict__",
    ):
        yield key, "3", WRONG
