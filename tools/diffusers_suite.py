"""Run diffusers' own tests on our schedulers, from a checkout of diffusers.

python tools/diffusers_suite.py path/to/diffusers

First its common scheduler suite with the tests of TCD and LCM. Then the LCM tests of Stable Diffusion's, SDXL's and
LCM's own pipelines (text to image, image to image, inpainting, ControlNets, T2I adapters), once with its LCMScheduler
and once with ours, whose pictures are compared. A small tokenizer replaces that of the hub, so the tests' expected
numbers do not apply. Needs the packages parameterized and requests_mock.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import sys
import tempfile
import unittest
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fewstep.inference.schedulers.base import FewStepScheduler
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 1e-5
"""Largest difference of pictures in [0, 1]."""

LATENTS = dict.fromkeys(
    ("test_clip_sample", "test_thresholding"), "latents are not clipped, and no student is trained so"
)
OTHER_SUMS = dict.fromkeys(
    ("test_full_loop_onestep_deter", "test_full_loop_multistep_deter"),
    "sums are those of first order, ending at index 0, on betas",
)
BETWEEN = dict.fromkeys(
    ("test_betas", "test_schedules", "test_custom_timesteps", "test_inference_steps"),
    "calls at times of other betas, or at whole indices; second calls are between two",
)
EIGHT = dict.fromkeys(
    ("test_timesteps", "test_inference_steps"), "8 points do not divide 100 indices; there are lists for up to 8 calls"
)
NO_BETAS = dict.fromkeys(
    (
        "test_betas",
        "test_trained_betas",
        "test_timesteps",
        "test_inference_steps",
        "test_custom_timesteps_too_large",
    ),
    "a flow has no betas, and its times are 1000 sigma, 1000 among them",
)
KINDS: Mapping[str, tuple[type[FewStepScheduler], dict[str, Any], dict[str, str]]] = {
    "SSS": (SSSScheduler, {}, LATENTS),
    "SSS by noise": (SSSScheduler, {"gamma": 0.3, "gamma_law": "noise"}, LATENTS),
    "SSS onto clean data": (SSSScheduler, {"end": "clean"}, LATENTS | OTHER_SUMS),
    "SSS of second order": (SSSScheduler, {"jump": "second_order"}, LATENTS | OTHER_SUMS | BETWEEN),
    "TLCM's times": (
        SSSScheduler,
        {"spacing": "tlcm", "grid": 8, "gamma": 1.0, "end": "clean"},
        LATENTS | OTHER_SUMS | EIGHT,
    ),
    "SSS on a flow": (
        SSSScheduler,
        {"path": "flow", "prediction_type": "flow_prediction", "shift": 3.0},
        LATENTS | OTHER_SUMS | NO_BETAS,
    ),
    "multistep consistency": (ConsistencyScheduler, {}, LATENTS),
}
PIPELINES = (
    "latent_consistency_models.test_latent_consistency_models",
    "latent_consistency_models.test_latent_consistency_models_img2img",
    "stable_diffusion.test_stable_diffusion",
    "stable_diffusion.test_stable_diffusion_img2img",
    "stable_diffusion.test_stable_diffusion_inpaint",
    "stable_diffusion_xl.test_stable_diffusion_xl",
    "stable_diffusion_xl.test_stable_diffusion_xl_img2img",
    "stable_diffusion_xl.test_stable_diffusion_xl_inpaint",
    "stable_diffusion_xl.test_stable_diffusion_xl_adapter",
    "stable_diffusion_adapter.test_stable_diffusion_adapter",
    "controlnet.test_controlnet",
    "controlnet.test_controlnet_sdxl",
)


def scheduler_tests(name: str) -> unittest.TestSuite:
    """Return diffusers' tests of TCD or LCM on one kind of ours, without those that do not apply."""
    ours, extra, left_out = KINDS[name]
    stem = "lcm" if ours is ConsistencyScheduler else "tcd"
    theirs: Any = getattr(
        importlib.import_module(f"tests.schedulers.test_scheduler_{stem}"), f"{stem.upper()}SchedulerTest"
    )

    def config(self: Any, **kwargs: Any) -> dict[str, Any]:
        return {**theirs.get_scheduler_config(self, **kwargs), **extra}

    def full_loop(self: Any, num_inference_steps: int = 10, seed: int = 0, **kwargs: Any) -> torch.Tensor:
        # theirs passes eta to step; ours has gamma in its config
        scheduler = ours(**{**self.get_scheduler_config(**kwargs), "gamma": 0.0})
        model, x = self.dummy_model(), self.dummy_sample_deter
        generator = torch.manual_seed(seed)
        scheduler.set_timesteps(num_inference_steps)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator).prev_sample
        return x

    own: dict[str, Any] = {"scheduler_classes": (ours,), "get_scheduler_config": config}
    if stem == "tcd":
        own["full_loop"] = full_loop
    if extra.get("spacing") == "tlcm":
        own |= {"forward_default_kwargs": (("num_inference_steps", 8),), "default_num_inference_steps": 8}
    for test, reason in left_out.items():
        own[test] = unittest.skip(reason)(getattr(theirs, test))
    return unittest.defaultTestLoader.loadTestsFromTestCase(type(name, (theirs,), own))


def run_schedulers() -> bool:
    """Run the scheduler tests; return whether all passed."""
    well = True
    for name in KINDS:
        report = io.StringIO()
        with redirect_stdout(io.StringIO()):
            result = unittest.TextTestRunner(report, verbosity=0).run(scheduler_tests(name))
        failed = len(result.failures) + len(result.errors)
        print(
            f"{name}: {result.testsRun - failed - len(result.skipped)} passed, {len(result.skipped)} left out",
            flush=True,
        )
        if failed:
            well = False
            print(report.getvalue())
    return well


def small_tokenizer(folder: Path) -> None:
    """Replace tokenizers of the hub by a small one."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_pipelines import clip_tokenizer

    clip_tokenizer(folder)
    plain = transformers.CLIPTokenizer.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if "hf-internal-testing" in str(name):
            return plain(cls, folder, model_max_length=77, local_files_only=True)
        return plain(cls, name, *args, **kwargs)

    transformers.CLIPTokenizer.from_pretrained = classmethod(from_pretrained)


def in_place(ours: Any) -> Any:
    """Return a replacement for LCMScheduler whose `from_config` keeps the pipeline's betas.

    diffusers' own `from_config` drops what the other scheduler had by default: betas would become LCMScheduler's.
    """
    from diffusers import LCMScheduler

    def kept(config: Mapping[str, Any]) -> Any:
        return ours.from_config({key: value for key, value in config.items() if key != "_use_default_values"})

    class Fake:
        def __new__(cls, **kwargs: Any) -> Any:
            return kept(LCMScheduler(**kwargs).config)

        from_config = staticmethod(kept)

    return Fake


def draw_pictures(module: Any, kind: Any, test: str, scheduler: Any) -> list[np.ndarray]:
    """Return the pictures of one test with a scheduler, without the test's own expectations."""
    pictures: list[np.ndarray] = []
    pipeline = kind.pipeline_class
    call = pipeline.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        pictures.append(np.asarray(out.images if hasattr(out, "images") else out[0], np.float64))
        return out

    module.LCMScheduler, pipeline.__call__ = in_place(scheduler), recorded
    try:
        one = kind()
        if hasattr(one, "setUp"):
            one.setUp()
        getattr(one, test)()
    except AssertionError:
        pass
    finally:
        pipeline.__call__ = call
    return pictures


def run_pipelines() -> bool:
    """Run the pipeline tests; return whether all pictures are equal."""
    from diffusers import LCMScheduler

    equal, every = 0, 0
    for name in PIPELINES:
        module = importlib.import_module(f"tests.pipelines.{name}")
        for label, kind in vars(module).copy().items():
            own = inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "pipeline_class")
            if not own or any(word in label for word in ("Slow", "Nightly")) or label == "AdapterTests":  # a base class
                continue
            for test in [test for test in dir(kind) if test.startswith("test") and "lcm" in test]:
                with redirect_stderr(io.StringIO()):
                    theirs, ours = (
                        draw_pictures(module, kind, test, one) for one in (LCMScheduler, ConsistencyScheduler)
                    )
                assert len(theirs) == len(ours) > 0
                apart = float(np.max([np.abs(a - b).max() for a, b in zip(theirs, ours, strict=True)]))  # NaN stays
                every, equal = every + 1, equal + (apart <= CLOSE)
                print(f"{label}.{test}: pictures within {apart:.1e}", flush=True)
    print(f"{equal} of {every} pipeline tests draw the same picture")
    return equal == every > 0


def main() -> None:
    """Run both parts; exit with code 1 where one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="diffusers' repository")
    sys.path.insert(0, str(parser.parse_args().checkout))
    well = run_schedulers()
    with tempfile.TemporaryDirectory() as folder:
        small_tokenizer(Path(folder) / "tokenizer")
        well = run_pipelines() and well
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
