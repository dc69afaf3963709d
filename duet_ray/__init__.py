"""duet_ray: find the mixture of your data for a task that you cannot look into (DUET, ICLR 2026).

    from duet_ray import Study, load_config

    study = Study(load_config("study.yaml"))
    study.run()
    print(study.best())

Importing this package loads neither torch nor ray; each heavy library is loaded by the module that wraps it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from duet_ray.errors import DuetError

if TYPE_CHECKING:
    from duet_ray.config import StudyConfig, load_config
    from duet_ray.study import Study

__version__ = "0.1.0"
__all__ = ["DuetError", "Study", "StudyConfig", "__version__", "load_config"]

_HOMES = {"Study": "duet_ray.study", "StudyConfig": "duet_ray.config", "load_config": "duet_ray.config"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'duet_ray' has no attribute {name!r}")
