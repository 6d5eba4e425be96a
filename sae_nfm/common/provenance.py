"""Where a result comes from: configuration, command, versions."""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

PACKAGES = ("sae-nfm", "sae-lens", "transformer-lens", "torch", "transformers", "datasets")


def provenance(
    config: Any, *, command: str | None = None, packages: tuple[str, ...] = (), **facts: Any
) -> dict[str, Any]:
    """What a saved result says of its origin.

    Args:
        config: the settings, a dataclass or a mapping.
        command: how to repeat it.
        packages: further packages whose versions matter.
        facts: what else it depends on, by name.
    """
    return {
        "config": dict(config) if isinstance(config, Mapping) else asdict(config),
        "command": command,
        **facts,
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)}
        | {"python": platform.python_version()},
    }
