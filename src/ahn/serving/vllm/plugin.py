"""What vLLM calls in each of its processes: names our model, our config parser and our checks."""

from __future__ import annotations

import logging
import re

from ahn.serving.vllm.checks import register_checks
from ahn.serving.vllm.parsing import ARCHITECTURE, WITH_EXPERTS, register_parser

OLDEST, NEWEST = (0, 32), (0, 32)
"""First two numbers of the oldest and newest version of vLLM that this was tested on."""

_log = logging.getLogger(__name__)


def register() -> None:
    """The entry point `vllm.general_plugins`: from now on vLLM serves bases with a memory.

    Another version of vLLM goes on without us, until it is asked for a base with a memory.
    """
    import vllm

    problem = version_problem(vllm.__version__)
    try:
        register_parser(problem)
    except ImportError:
        _log.warning(problem or f"vLLM {vllm.__version__} has no config parsers, so it serves no memory of ahn")
        return
    if problem is None:
        register_checks()
        for name in (ARCHITECTURE, WITH_EXPERTS):
            vllm.ModelRegistry.register_model(name, f"ahn.serving.vllm.model:{name}")


def version_problem(version: str) -> str | None:
    """Why a version of vLLM cannot serve a memory, or `None` if it can.

    Args:
        version: Its version, such as "0.32.0".
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return None
    tested = ".".join(map(str, OLDEST))
    return (
        f"ahn serves a memory through vLLM {tested}, and this is vLLM {version}, whose inner interfaces may differ; "
        f'install "vllm=={tested}.*", or serve the folder by `ahn serve`'
    )
