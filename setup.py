"""The build step that pyproject.toml cannot state: the bundled world goes into the package."""

from pathlib import Path
from shutil import copytree, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithWorld(build_py):
    """Copy `world/` to `fewstep_worlds/bundled/`, except into an editable installation, which reads it in place."""

    def run(self) -> None:
        """Build the packages, then the world."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fewstep_worlds" / "bundled"
            rmtree(target, ignore_errors=True)
            copytree("world", target)


setup(cmdclass={"build_py": BuildWithWorld})
