"""Refuse grids, steps and sizes that a pipeline's schedule or network does not have, and consistency models."""

from __future__ import annotations

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.choices import End
from fewstep.common.errors import UserError
from fewstep.diffusion.config import GridSpec, Sampling, check_indices


def check_sampling(sampling: Sampling, folder: PipelineFolder) -> None:
    """Refuse settings that do not fit the pipeline's schedule or its network's size.

    Raises:
        UserError: a grid off the schedule, more steps than it has indices, or a side that latents cannot have.
    """
    check_times("", sampling, folder)
    check_guidance("", sampling, folder.embeds_guidance)


def check_diffusion(folder: PipelineFolder) -> None:
    """Refuse a consistency model in the place of a diffusion model: no solver follows its trajectories."""
    if folder.consistency:
        raise UserError(
            f"teacher = {str(folder.path)!r} is a consistency model, whose trajectories no solver follows; give the "
            "diffusion model that it was distilled from (to train it further: student.kind = 'full', student.start = "
            "its folder, method.extra_conditioning = ['w'])"
        )


def check_guidance(section: str, sampling: Sampling, embedded: bool) -> None:
    """Refuse guidance by two branches of a network that embeds it.

    Raises:
        UserError: omega beside an embedded w.
    """
    if embedded and "w" in sampling.extra_conditioning and sampling.omega:
        raise UserError(
            f"{section}omega = {sampling.omega:g} guides a second time: the network embeds its guidance, {section}w = "
            f"{sampling.w:g}; use {section}omega = 0"
        )


def check_times(section: str, sampling: Sampling, folder: PipelineFolder) -> None:
    """Refuse a size, grid or number of steps that the pipeline does not have; `section` precedes field names."""
    if sampling.size:
        folder.check_size(f"{section}size", sampling.size)
    if sampling.spacing != "trailing":
        check_grid(f"{section}grid", 8 if sampling.spacing == "tlcm" else sampling.grid, folder)
    else:
        check_steps(f"{section}steps", sampling.steps, index_count(folder) * sampling.calls_a_step)


def check_steps(field: str, steps: int, most: int) -> None:
    """Refuse more steps than the schedule has indices."""
    if steps > most:
        raise UserError(f"{field} = {steps} must be at most {most}")


def check_trajectory(grid: GridSpec, end: End, folder: PipelineFolder) -> None:
    """Refuse a grid that no trajectory from pure noise to the end point could have.

    Raises:
        UserError: a grid off the teacher's schedule, below its noisiest index, or with the end point in it.
    """
    check_grid("grid", grid, folder)
    top = index_count(folder) - 1
    if not isinstance(grid, int) and grid[-1] < top:
        raise UserError(f"grid = {list(grid)} ends below pure noise, where drawing starts; add {top}")
    lowest = (top + 1) // grid - 1 if isinstance(grid, int) else grid[0]
    if end == "index0" and lowest <= 0:
        raise UserError("end = 'index0' is the grid's lowest point already; use 'clean'")


def index_count(folder: PipelineFolder) -> int:
    """Return the number of training indices of a pipeline's scheduler."""
    return int(folder.config("scheduler").get("num_train_timesteps", 1000))


def check_grid(field: str, grid: GridSpec, folder: PipelineFolder) -> None:
    """Refuse a grid off the teacher's schedule (`diffusion.config.check_indices`)."""
    check_indices(field, grid, index_count(folder))
