"""Names that modules had before they moved into packages, kept for one release.

Pipelines that were saved with a fewstep scheduler name its module in their model_index.json, and launch commands name
`fewstep.cli`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

RENAMED = {
    "fewstep.cli": "fewstep.commands.app",
    "fewstep.data.pictures": "fewstep.data.images",
    "fewstep.errors": "fewstep.common.errors",
    "fewstep.export.header": "fewstep.students.lora_header",
    "fewstep.export.lora": "fewstep.students.lora",
    "fewstep.folder": "fewstep.backbones.pipeline_folder",
    "fewstep.schedulers": "fewstep.inference.schedulers.few_step",
    "fewstep.settings": "fewstep.distillation.config",
}


class _RenamedModules:
    """Finder and loader: importing an old name imports the new module, running it runs the new one."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in RENAMED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(RENAMED[module.__name__])

    def get_source(self, fullname: str) -> str:
        return f"import runpy; runpy.run_module({RENAMED[fullname]!r}, run_name=__name__)"

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_source(fullname), f"<{fullname}>", "exec")


def install() -> None:
    """Register the finder of old names, for imports and `python -m`."""
    sys.meta_path.insert(0, _RenamedModules())
