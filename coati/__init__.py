"""coati: aligning chat models with human feedback on ColossalAI. Importing it loads nothing
heavy."""

import sys
from importlib.abc import MetaPathFinder

__version__ = "0.1.0"


class _RenamedModules(MetaPathFinder):
    """The last to be asked for a module: those of earlier releases are found under today's name."""

    def find_spec(self, name: str, path=None, target=None):
        if not name.startswith("coati."):
            return None
        from coati.legacy.renamed import spec_of_renamed

        return spec_of_renamed(name)


sys.meta_path.append(_RenamedModules())
