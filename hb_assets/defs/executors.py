"""The executor that runs the steps of a run, chosen by HB_EXECUTOR.

In process is the default: a run is one day's work, and mostly seconds long; processes of their own
would cost more than the steps do. Runs are started by `launcher`.
"""

from __future__ import annotations

import importlib

import dagster as dg

from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings


def chosen(settings: Settings) -> dg.ExecutorDefinition:
    """The executor that HB_EXECUTOR names.

    Raises:
        SettingsError: there is none of that name.
    """
    match settings.executor.split(":"):
        case ["in_process"]:
            return dg.in_process_executor
        case ["multiprocess"]:
            return dg.multiprocess_executor.configured(_PRELOADED, name="preloaded")
        case [module, name]:
            return _named(module, name)
    raise SettingsError(f"settings: HB_EXECUTOR: no executor is called {settings.executor!r}")


_PRELOADED = {"start_method": {"forkserver": {"preload_modules": ["hb_assets.definitions"]}}}
"""A step's process is forked from one that has imported all of this once."""


def _named(module: str, name: str) -> dg.ExecutorDefinition:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"settings: HB_EXECUTOR: {error}") from None
    if not isinstance(found, dg.ExecutorDefinition):
        raise SettingsError(f"settings: HB_EXECUTOR: {module}:{name} is no executor of Dagster's")
    return found
