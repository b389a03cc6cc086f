"""The sources of training pictures and prompts that `data.source` names, parsed and checked once. Light: no torch.

Synthesised sets, which hold latents, are the one other source (`fewstep.distillation.checks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fewstep.common.defaults import World, check_world_size, installed_world, world
from fewstep.data.folder_files import check_pictures
from fewstep.data.prompts import is_prompt_file, is_shards, read_prompts

if TYPE_CHECKING:
    from fewstep.data.images import Captioned


@dataclass(frozen=True)
class ImageFolder:
    """A folder that holds pictures with captions."""

    folder: Path
    pictures: ClassVar[bool] = True


@dataclass(frozen=True)
class Shards:
    """Webdataset shards, by their URLs in order."""

    urls: tuple[str, ...]
    pictures: ClassVar[bool] = True


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a text file."""

    prompts: tuple[str, ...]
    pictures: ClassVar[bool] = False


@dataclass(frozen=True)
class WorldData:
    """Data of the bundled world, whose captions are drawn by a seed.

    Attributes:
        pictures: whether it is the pictures with captions; else the captions alone.
    """

    world: World
    pictures: bool


CaptionedSource = ImageFolder | Shards | PromptFile | WorldData


def open_captioned(named: str, size: int) -> CaptionedSource:
    """Parse `data.source`: the bundled world's pictures or captions, a prompt file, shards, or a folder of pictures.

    Args:
        size: of the training pictures, in pixels; the world's have one size.

    Raises:
        UserError: there is no such source, it holds no prompt or picture, or its pictures have another size.
    """
    own = installed_world() if named else world("data.source")
    if own is not None and named in (own.PICTURES, own.CAPTIONS):
        pictures = named == own.PICTURES
        remedy = "give a folder of pictures" if pictures else "give a prompt file"
        check_world_size(size, f"data.source = {named!r}", remedy)
        return WorldData(own, pictures)
    if is_prompt_file(named):
        return PromptFile(tuple(read_prompts(named, "data.source")))
    if is_shards(named):
        from fewstep.data.shards import find_shards

        return Shards(tuple(find_shards(named)))
    check_pictures(named)
    return ImageFolder(Path(named))


def read_captioned(source: CaptionedSource, size: int, captions: int, seed: int, cache: Path) -> Captioned:
    """Find the captioned pictures of a source, decoded when they are used; all processes of a launch must call it.

    Args:
        size: pixels a side.
        captions: a picture, drawn by `seed` from the bundled world's words.
        cache: folder for lists of what shards hold.

    Raises:
        UserError: a file cannot be read, or a picture has no caption.
    """
    from fewstep.common.distributed import main_process_first
    from fewstep.data.images import from_folder, from_prompts
    from fewstep.data.shards import from_shards

    match source:
        case ImageFolder(folder):
            return from_folder(folder, size)
        case Shards(urls):
            return main_process_first(lambda: from_shards(urls, size, cache))
        case PromptFile(prompts):
            return from_prompts(prompts)
    draw = source.world.captioned if source.pictures else source.world.captions_alone
    captioned: Captioned = draw(captions, seed)
    return captioned


def read_named_prompts(named: str) -> tuple[str, ...]:
    """Read `validation.prompts`: a prompt file, or one of the bundled world's lists.

    Raises:
        UserError: there is no such list, or the file holds no prompt.
    """
    if is_prompt_file(named):
        return tuple(read_prompts(named, "validation.prompts"))
    return world("validation.prompts").read_prompts(named)
