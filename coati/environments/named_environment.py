"""From the name of an environment to what makes one for each sample."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from coati.environments.environment_table import ENVIRONMENTS, file_and_class, is_class_file
from coati.rewards.user_function import described


def environment_factory(name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """What makes environments ``name`` with ``arguments``; one is made to try it out.

    Raises ValueError when the file cannot be run, the class is not there, has no reset or step, or
    does not take the arguments.
    """
    kind = _class_in_file(name) if is_class_file(name) else _listed(name)

    def make() -> Any:
        try:
            return kind(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too
            if isinstance(error, ValueError) and name in ENVIRONMENTS:
                raise ValueError(f"--environment {name}: {error}") from error
            raise ValueError(
                f"--environment {name}: {kind.__name__} cannot be made with {arguments or 'no'} "
                f"arguments (--environment_args): {described(error)}"
            ) from error

    first = make()
    missing = [each for each in ("reset", "step") if not callable(getattr(first, each, None))]
    if missing:
        raise ValueError(
            f"--environment {name}: {kind.__name__} has no {' and no '.join(missing)}; an "
            "environment has reset(row) -> messages and step(response) -> Turn"
        )
    return make


def _listed(name: str) -> Any:
    module, _, found = ENVIRONMENTS[name].place.partition(":")
    return getattr(importlib.import_module(module), found)


def _class_in_file(name: str) -> Any:
    path, wanted = file_and_class(name)
    if not path.is_file():
        raise ValueError(f"--environment {name}: there is no file {path}")
    module_name = f"coati_environment_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--environment {name}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too
        raise ValueError(
            f"--environment {name}: running {path} failed: {described(error)}"
        ) from error
    found = getattr(module, wanted, None)
    if not isinstance(found, type):
        raise ValueError(f"--environment {name}: {path} has no class {wanted}, but {found!r}")
    return found
