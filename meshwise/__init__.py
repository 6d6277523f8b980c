"""meshwise: plan, simulate, really run and validate parallel training and decoding.

>>> import meshwise as mw
>>> mw.predict("examples/gemm.toml").metrics["bound"]  # doctest: +SKIP
'compute'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwise.api import (
        calibrate,
        hardware,
        largest,
        models,
        plan,
        predict,
        run,
        schema,
        simulate,
        validate,
    )
    from meshwise.result import Result
    from simcore.errors import InputError, MeshwiseError, RunError
    from simcore.scenario import Scenario, load_scenario, make_scenario

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "MeshwiseError",
    "Result",
    "RunError",
    "Scenario",
    "calibrate",
    "hardware",
    "largest",
    "load_scenario",
    "make_scenario",
    "models",
    "plan",
    "predict",
    "run",
    "schema",
    "simulate",
    "validate",
]

_HOMES = {
    "Result": "meshwise.result",
    **dict.fromkeys(("InputError", "MeshwiseError", "RunError"), "simcore.errors"),
    **dict.fromkeys(("Scenario", "load_scenario", "make_scenario"), "simcore.scenario"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: ``import meshwise`` alone loads nothing else."""
    if name not in __all__:
        raise AttributeError(f"module 'meshwise' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "meshwise.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
