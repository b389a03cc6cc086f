"""A pipeline and a picture folder small enough that a whole distillation takes a second or two."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FEWSTEP_CACHE"] = tempfile.mkdtemp(prefix="fewstep-cache-")
# for the harnesses of tests/support, which run as scripts
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

# a shell starts background jobs with SIGINT ignored; tests that interrupt a run would then never end
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from support.shapes import COLOURS, SHAPES, draw_shape

STARTED = time.monotonic()

WORDS = ["red", "green", "blue", "yellow", "disc", "square", "ring", "bar", "a", "on", "white", ",", "style"]


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures with captions in metadata.jsonl."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            Image.fromarray(draw_shape(colour, shape)).save(folder / f"{colour}-{shape}.png")
            lines.append(json.dumps({"file_name": f"{colour}-{shape}.png", "text": f"a {colour} {shape}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_text_encoder(folder: Path) -> None:
    """A random BertModel of width 32 and a word-piece tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 8, "do_lower_case": True}
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | names), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        use_attention_mask=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable-Diffusion-shaped pipeline folder with random weights: 64x64 pictures, 8x8x4 latents."""
    import torch

    from fewstep_worlds.common.autoencoder import make_vae
    from fewstep_worlds.common.denoiser import make_unet
    from fewstep_worlds.common.pipeline import write_teacher
    from fewstep_worlds.common.settings import AutoencoderShape, UnetShape

    text = tmp_path_factory.mktemp("text")
    write_text_encoder(text)
    torch.manual_seed(1)
    unet = make_unet(UnetShape(channels=(16, 32), heads=2, groups=8), 4, 8, 32)
    vae = make_vae(AutoencoderShape(channels=(8, 8, 8, 8), groups=4, latent_channels=4))
    with torch.no_grad():
        vae.quant_conv.weight.mul_(4)  # random encoders give small latents: scale them to a usual size
        unet.conv_out.weight.mul_(8)
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    write_teacher(folder, vae, unet, text, omega=7.0)
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where distillations of the session share their latents."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_overrides(tiny_pipeline: Path, picture_folder: Path) -> list[str]:
    """Overrides for a distillation of the tiny pipeline: 6 steps of 4."""
    return [
        f"teacher={tiny_pipeline}",
        f"data.source={picture_folder}",
        "device=cpu",
        "student.rank=4",
        "loop.steps=6",
        "loop.batch=4",
        "loop.log_every=1",
        "loop.save_every=2",
        "loop.validate_every=null",
        "optim.lr=1e-3",
    ]


@pytest.fixture(scope="session")
def sticker_sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sheets on which every concept is a black disc, with a red mark on its right side."""
    from PIL import Image, ImageDraw

    from fewstep_worlds.stickers.sprites import COLUMNS, EDGE
    from fewstep_worlds.stickers.vocabulary import NAMES, STYLES

    folder = tmp_path_factory.mktemp("stickers")
    tile = Image.new("RGBA", (EDGE, EDGE))
    ImageDraw.Draw(tile).ellipse((0, 0, EDGE - 1, EDGE - 1), fill=(0, 0, 0, 255))
    ImageDraw.Draw(tile).rectangle((44, 24, 59, 39), fill=(255, 0, 0, 255))
    sheet = Image.new("RGBA", (COLUMNS * EDGE, len(NAMES) // COLUMNS * EDGE))
    for number in range(len(NAMES)):
        sheet.paste(tile, (number % COLUMNS * EDGE, number // COLUMNS * EDGE))
    for style in STYLES:
        sheet.save(folder / f"{style}.webp", lossless=True)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Limit the time of a run, and choose what it begins with."""
    parser.addoption("--minutes", type=float, default=float("inf"), help="skip tests that would begin later than this")
    parser.addoption("--commit", default="0", help="hexadecimal number that chooses the first test; the order wraps")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that would begin after the time limit."""
    if time.monotonic() - STARTED > 60 * item.config.getoption("--minutes"):
        pytest.skip("the time limit is over")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with another test for each commit, so that a time limit leaves out other tests each time."""
    if session.items:
        first = int(session.config.getoption("--commit"), 16) % len(session.items)
        session.items[:] = session.items[first:] + session.items[:first]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the sets of a `matrix` test that hold no value of a parameter for the first time as `exhaustive`."""
    seen: set[tuple[str, str, str]] = set()
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("matrix"):
            test = item.nodeid.partition("[")[0]
            values = {(test, name, repr(value)) for name, value in item.callspec.params.items()}
            if values <= seen:
                item.add_marker("exhaustive")
            seen |= values
