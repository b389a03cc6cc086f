"""Refuse grids, steps and sizes that a pipeline's schedule or network does not have, and consistency models."""

from __future__ import annotations

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.choices import End
from fewstep.common.errors import UserError, nearest_divisor
from fewstep.diffusion.config import GridSpec, Sampling


def check_sampling(sampling: Sampling, folder: PipelineFolder) -> None:
    """Refuse settings that the pipeline's schedule has no times for, or its network no size.

    Raises:
        UserError: a grid off the schedule, more steps than it has indices, or a side that latents cannot have.
    """
    _check_times("", sampling, folder)
    _check_guidance("", sampling, folder.embeds_guidance)


def check_diffusion(field: str, folder: PipelineFolder) -> None:
    """Refuse a consistency model where a diffusion model is asked for.

    Raises:
        UserError: it is one: its outputs point to where trajectories end, and no solver follows them.
    """
    if folder.consistency:
        raise UserError(
            f"{field} = {str(folder.path)!r} is a consistency model, whose trajectories no solver follows; the nearest "
            "is the diffusion model that it was distilled from (to train it further: student.kind = 'full', "
            "student.start = its folder, method.extra_conditioning = ['w'])"
        )


def _check_guidance(section: str, sampling: Sampling, embedded: bool) -> None:
    """Refuse two guidances of a network that embeds one."""
    if embedded and "w" in sampling.extra_conditioning and sampling.omega:
        raise UserError(
            f"{section}omega = {sampling.omega:g} guides a second time: the network embeds its guidance, {section}w = "
            f"{sampling.w:g}; the nearest legal {section}omega is 0"
        )


def _check_times(section: str, sampling: Sampling, folder: PipelineFolder) -> None:
    if sampling.size:
        folder.check_size(f"{section}size", sampling.size)
    if sampling.spacing != "trailing":
        _check_grid(f"{section}grid", 8 if sampling.spacing == "tlcm" else sampling.grid, folder)
        return
    _check_steps(f"{section}steps", sampling.steps, _indices(folder) * sampling.calls_a_step)


def _check_steps(field: str, steps: int, most: int) -> None:
    if steps > most:
        raise UserError(f"{field} = {steps} is out of range; the nearest legal one is {most}")


def check_walk(grid: GridSpec, end: End, folder: PipelineFolder) -> None:
    """Refuse a grid that a walk from pure noise to the end point could not visit.

    Raises:
        UserError: it is off the teacher's schedule, does not start at its noisiest index, or has the end point in it.
    """
    _check_grid("grid", grid, folder)
    top = _indices(folder) - 1
    if not isinstance(grid, int) and grid[-1] < top:
        legal = [*grid[:-1], top]
        raise UserError(f"grid = {list(grid)} ends below pure noise, where drawing starts; the nearest is {legal}")
    lowest = (top + 1) // grid - 1 if isinstance(grid, int) else grid[0]
    if end == "index0" and lowest <= 0:
        raise UserError("end = 'index0' is the grid's lowest point already; the nearest legal one is 'clean'")


def _indices(folder: PipelineFolder) -> int:
    return int(folder.config("scheduler").get("num_train_timesteps", 1000))


def _check_grid(field: str, grid: GridSpec, folder: PipelineFolder) -> None:
    indices = _indices(folder)
    if not isinstance(grid, int):
        if sorted(set(grid)) != list(grid) or grid[0] < 0 or grid[-1] > indices - 1:
            legal = sorted({min(max(t, 0), indices - 1) for t in grid})
            raise UserError(f"{field} = {list(grid)} must rise within 0 .. {indices - 1}; the nearest is {legal}")
        return
    if indices % grid:
        raise UserError(
            f"{field} = {grid} does not divide the teacher's {indices} training indices; "
            f"the nearest legal one is {nearest_divisor(grid, indices)}"
        )
