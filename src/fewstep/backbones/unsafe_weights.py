"""Pickled weights are never read: what is said where a user has them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fewstep.common.safetensors_header import is_safetensors

SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_WEIGHTS = re.compile(r"((?:diffusion_)?pytorch_model)(\.\w+)?(-\d+-of-\d+)?\.bin")
"""What a component's weights are called: of a variant (fp16), or one of several shards, or both."""
_PLAIN = {"pytorch_model": "model"}
"""What transformers calls them as safetensors; diffusers keeps its name."""


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle by its name. Renamed safetensors files are none."""
    return path.suffix.lower() in SUFFIXES and not is_safetensors(path)


def first_pickle(paths: Iterable[Path]) -> Path | None:
    """The first pickle among files: a component's weights before others, variants after plain ones; then by name."""

    def place(path: Path) -> tuple[bool, bool, str]:
        weights = _WEIGHTS.fullmatch(path.name)
        return weights is None, bool(weights and weights[2]), path.name

    return min((path for path in paths if is_pickle(path)), key=place, default=None)


def advice(path: Path) -> str:
    """The command that converts one to the name that is read, and with a shard all others and their index; it runs
    from anywhere."""
    path = path.resolve()
    weights = _WEIGHTS.fullmatch(path.name)
    plain = _PLAIN.get(weights[1], weights[1]) if weights else path.stem
    if weights and weights[3]:
        stem = weights[1] + (weights[2] or "")
        return (
            'convert all shards where you trust them: python -c "import json, torch, safetensors.torch as s; '
            f"from pathlib import Path; d, m = Path({str(path.parent)!r}), {{}}; "
            "[(s.save_file(w, d / n, {'format': 'pt'}), m.update(dict.fromkeys(w, n))) "
            f"for f in sorted(d.glob('{stem}-*-of-*.bin')) for n in [f'{plain}{{f.stem[{len(stem)}:]}}.safetensors'] "
            "for w in [{k: v.contiguous().clone() for k, v in "
            "torch.load(f, map_location='cpu', weights_only=True).items()}]]; "
            f"(d / '{plain}.safetensors.index.json').write_text(json.dumps({{'metadata': {{}}, 'weight_map': m}}))\""
        )
    source, target = str(path), str(path.with_name(f"{plain}.safetensors"))
    return (
        f'convert it where you trust it: python -c "import torch, safetensors.torch as s; '
        f"w = torch.load({source!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous().clone() for k, v in w.get('state_dict', w).items() if hasattr(v, 'shape')}}, "
        f"{target!r}, {{'format': 'pt'}})\""
    )
