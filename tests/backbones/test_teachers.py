"""Teachers that are one file, or a hub's: they end as a pipeline folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.backbones import teachers
from fewstep.backbones.base import load_backbone
from fewstep.backbones.single_file import convert
from fewstep.backbones.single_file.sd_checkpoint import checkpoint_weights
from fewstep.common.errors import UserError
from support import tiny_pipelines
from support.original_names import sd3_original


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def single_file(name: str, folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    import diffusers

    kind: Any = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[name]
    pipe = kind.from_pretrained(folder, local_files_only=True)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if name == "sdxl" else [])]
    weights = checkpoint_weights(
        pipe.unet.state_dict(), pipe.vae.state_dict(), encoders, prediction="eps", zero_snr=False
    )
    save_file({key: value.to(dtype).contiguous() for key, value in weights.items()}, file)
    return file


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_single_file_is_the_pipeline_that_it_was(name: str, tmp_path: Path, cache: Path) -> None:
    folder = tiny_pipelines.FAMILIES[name](tmp_path / "tiny")
    file = single_file(name, folder, tmp_path / "model.safetensors")
    bare = tmp_path / "configs"  # configs and tokenizers alone, as one would hand around
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    place = teachers.teacher_folder(file, bare)
    assert place.parent == cache / "teachers"
    own, found = load_backbone(folder), load_backbone(place)
    prompts = ["a red disc", ""]
    for key, value in own.encode(prompts).items():
        assert torch.equal(found.encode(prompts)[key], value)
    for key, value in own.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[key], value)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own.decode(latents), found.decode(latents))
    before = (place / "model_index.json").stat().st_mtime_ns
    assert teachers.teacher_folder(file, bare) == place
    assert (place / "model_index.json").stat().st_mtime_ns == before, "taken apart once"


def test_several_at_once_take_a_file_apart_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a launch name it all at once; who comes second waits, and replaces nothing."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    folder = tiny_pipelines.sd(tmp_path / "tiny")
    file = single_file("sd", folder, tmp_path / "model.safetensors")
    together, made = Barrier(3), []

    def slowly(*args: Any) -> None:
        made.append(args[-1])
        time.sleep(0.3)
        (args[-1] / "model_index.json").write_text("{}")

    def one(_: int) -> tuple[Path, int]:
        together.wait()
        place = teachers.teacher_folder(file, folder)
        return place, (place / "model_index.json").stat().st_ino

    monkeypatch.setattr(convert, "_convert", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(3)))
    assert len(made) == len(set(found)) == 1
    left = [path for path in (cache / "teachers").iterdir() if path.suffix != ".lock"]
    assert left == [found[0][0]]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_alone_takes_the_rest_from_the_folder(prefix: str, tmp_path: Path) -> None:
    """Stable Diffusion 3, as ComfyUI's folders hold it, and inside a whole checkpoint."""
    folder = tiny_pipelines.sd3(tmp_path / "tiny")
    weights = dict(load_backbone(folder).network.state_dict())
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks"))
    changed = {name: value + 0.01 for name, value in weights.items()}
    file = tmp_path / "model.safetensors"
    original = sd3_original(changed, layers)
    save_file({f"{prefix}{name}": value.contiguous() for name, value in original.items()}, file)
    place = teachers.teacher_folder(file, folder)
    found = load_backbone(place)
    for name, value in found.network.state_dict().items():
        torch.testing.assert_close(value, changed[name], atol=1e-6, rtol=0)
    rest = ("vae", "text_encoder_3")
    assert found.folder.identity(*rest) == load_backbone(folder).folder.identity(*rest)
    with pytest.raises(
        UserError, match=r"one file, without its configs; give --teacher-config FOLDER, a StableDiffusion3"
    ):
        teachers.teacher_folder(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """bf16 is not stored as fp16: small values would be lost."""
    from safetensors.torch import load_file

    folder = tiny_pipelines.sd(tmp_path / "tiny")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1e-20 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    file = single_file("sd", folder, tmp_path / "half.safetensors", dtype)
    place = teachers.teacher_folder(file, folder)
    found, own = load_file(place / "unet" / weights.name), load_file(weights)
    for name, value in found.items():
        assert value.dtype == dtype
        assert torch.equal(value, own[name].to(dtype)), name


def test_the_prediction_in_a_files_metadata_overrides_the_config(tmp_path: Path) -> None:
    """A network of v beside the config of one of eps: by the empty tensors of other tools, or by our own record."""
    import json

    folder = tiny_pipelines.sd(tmp_path / "tiny")
    plain = single_file("sd", folder, tmp_path / "plain.safetensors")
    from safetensors.torch import load_file

    weights = load_file(plain)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    ours = {"fewstep": json.dumps({"prediction": "v"})}
    for name, more, record, wanted in (
        ("plain", {}, None, ("epsilon", False)),
        ("marked", marks, None, ("v_prediction", True)),
        ("soft", {"v_pred": torch.zeros(0)}, None, ("v_prediction", False)),
        ("ours", {}, ours, ("v_prediction", False)),
    ):
        save_file(weights | more, tmp_path / f"{name}.safetensors", record)
        place = teachers.teacher_folder(tmp_path / f"{name}.safetensors", folder)
        config = json.loads((place / "scheduler" / "scheduler_config.json").read_text())
        assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == wanted, name
        assert load_backbone(place).prediction == {"epsilon": "eps", "v_prediction": "v"}[wanted[0]]


@pytest.mark.parametrize("suffix", [".ckpt", ".bin"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(suffix: str, tmp_path: Path) -> None:
    pickled = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {"a.weight": torch.arange(3.0)}, "epoch": 3}, pickled)
    with pytest.raises(UserError, match=r"a pickle, which is never read; .*safe_serialization") as error:
        teachers.teacher_folder(pickled)
    assert error.value.field == "teacher"


def test_a_pickle_in_the_place_of_weights_is_named(tmp_path: Path) -> None:
    """In a pipeline's folder, as a LoRA, in a LoRA's folder."""
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.students.lora_checks import check_lora

    folder = tiny_pipelines.sd(tmp_path / "tiny")
    own = read_folder(folder)
    (tmp_path / "lora").mkdir()
    lora = tmp_path / "lora" / "pytorch_lora_weights.bin"
    torch.save({}, lora)
    for named in (lora, lora.parent):
        with pytest.raises(UserError, match=r"pytorch_lora_weights\.bin.* a pickle, which is never read") as error:
            check_lora(named, own)
        assert error.value.field == "lora"
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.bin"))
    (folder / "unet" / "args.bin").write_bytes((folder / "unet" / "diffusion_pytorch_model.bin").read_bytes()[8:])
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pickled weights are never read.*\(diffusion_pytorch_model\.bin\)"):
        read_folder(folder)


def test_a_folder_with_a_scheduler_of_ours_is_a_teacher(tmp_path: Path) -> None:
    """What a pipeline saves after its scheduler was changed: of a scheduler the config is read, no code."""
    import diffusers

    import fewstep

    folder = tiny_pipelines.sd(tmp_path / "tiny")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.scheduler = fewstep.SSSScheduler.from_config(pipe.scheduler.config, gamma=0.3)
    pipe.save_pretrained(tmp_path / "saved")
    own, found = load_backbone(folder), load_backbone(tmp_path / "saved")
    t = torch.arange(1000.0, dtype=torch.float64)
    assert torch.equal(found.path.sigma(t), own.path.sigma(t))
    assert found.prediction == own.prediction


def test_what_cannot_be_a_teacher_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "sd" / "tiny")
    other = tiny_pipelines.sdxl(tmp_path / "sdxl" / "tiny")
    file = single_file("sd", folder, tmp_path / "model.safetensors")
    save_file({"blocks.0.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    for named, config, words in (
        (file, "", r"is one file, without its configs; give --teacher-config FOLDER, a StableDiffusionPipeline's"),
        (file, other, r"is StableDiffusionXLPipeline; model.safetensors needs a folder of a StableDiff"),
        (file, tmp_path, "is no pipeline folder"),
        (tmp_path / "odd.safetensors", folder, "is of an unknown architecture: it holds 'blocks.0.weight'"),
        (tmp_path / "none.safetensors", folder, "does not exist"),
        (folder, folder, "is for single-file teachers"),
        ("nobody/nothing", "", "is neither a folder here nor could be fetched from the hub"),
    ):
        with pytest.raises(UserError, match=words) as error:
            teachers.teacher_folder(named, config)
        assert "\n" not in str(error.value)
    assert teachers.teacher_folder(folder) == folder


def test_verbs_take_a_single_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fewstep sample` draws the same from the file as from the folder; refusals are one line and exit code 2."""
    from fewstep.commands.app import main

    folder = tiny_pipelines.sd(tmp_path / "tiny")
    file = single_file("sd", folder, tmp_path / "model.safetensors")
    words = ["sample", "a red disc", "--lora", "none", "--steps", "2", "--scale", "1", "--device", "cpu"]
    for name, teacher in (("a", [str(folder)]), ("b", [str(file), "--teacher-config", str(folder)])):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--teacher", *teacher, "--out", str(tmp_path / f"{name}.png")])
        assert ended.value.code == 0
    first, second = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("a", "b"))
    assert first == second
    capsys.readouterr()
    for teacher, expected in (
        ([str(file)], "give --teacher-config FOLDER"),
        ([str(tmp_path / "model.ckpt")], "is a pickle"),
        (["nobody/nothing"], "could be fetched from the hub"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--teacher", *teacher, "--out", str(tmp_path / "c.png")])
        assert ended.value.code == 2
        printed = capsys.readouterr().err.strip()
        assert expected in printed
        assert "\n" not in printed
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red disc {i}\n" for i in range(10)))
    options = {"synthesize": ["--prompts", str(prompts)], "evaluate": ["--prompt-file", str(prompts)], "distill": []}
    options |= {"train-latent-lpips": ["--prompt-file", str(prompts)], "train-adapter": []}
    for verb, more in options.items():
        with pytest.raises(SystemExit) as ended:
            main([verb, "--teacher", str(file), "--out", str(tmp_path / verb), *more])
        assert ended.value.code == 2
        assert "give --teacher-config FOLDER" in capsys.readouterr().err
    words = ["synthesize", *options["synthesize"], "-s", "grid=4", "-s", "device=cpu"]
    for name, teacher in (("a", [str(folder)]), ("b", [str(file), "--teacher-config", str(folder)])):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--teacher", *teacher, "--out", str(tmp_path / name)])
        assert ended.value.code == 0
    shards = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("a", "b")]
    assert shards[0] == shards[1]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--teacher", str(file), "--teacher-config", str(folder), "--out", str(tmp_path / "run"),
              "--dry-run", "-s", "data.source=nowhere"])  # fmt: skip
    assert ended.value.code == 2
    assert "nowhere" in capsys.readouterr().err, "the teacher was found"


def test_of_a_hub_only_what_is_read_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake hub: the requests that it gets, and that its folder is the teacher."""
    folder = tiny_pipelines.sd(tmp_path / "tiny")
    import fnmatch

    import huggingface_hub

    requests: dict[str, Any] = {}

    def snapshot(name: str, **settings: Any) -> str:
        requests.update(settings, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert teachers.teacher_folder("someone/model@v2") == folder
    assert (requests["name"], requests["revision"]) == ("someone/model", "v2")
    for file, taken in (
        ("unet/diffusion_pytorch_model.safetensors", True),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", True),
        ("unet/diffusion_pytorch_model.safetensors.index.json", True),
        ("text_encoder/model.safetensors", True),
        ("tokenizer/merges.txt", True),
        ("scheduler/scheduler_config.json", True),
        ("model_index.json", True),
        ("LICENSE.md", True),
        ("v1-5-pruned.safetensors", False),
        ("unet/diffusion_pytorch_model.fp16.safetensors", False),
        ("unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", False),
        ("unet/diffusion_pytorch_model.non_ema.safetensors", False),
        ("safety_checker/model.safetensors", False),
        ("unet/diffusion_pytorch_model.bin", False),
        ("a.py", False),
    ):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in requests["allow_patterns"]) == taken, file
