"""Programs that know nothing of the project, beside processes of the project that do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

FOREIGN = """
import runpy, sys
sys.modules["durably"] = sys.modules["durably_schemas"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script in a process where an import of the project fails."""


def environment_of(kafka: str, namespace: str, data_dir: Path) -> dict[str, str]:
    """That of a processor or worker as a process."""
    return os.environ | {
        "DURABLY_URL": f"kafka://{kafka}",
        "DURABLY_NAMESPACE": namespace,
        "DURABLY_DATA_DIR": str(data_dir),
        "DURABLY_PARTITIONS": "3",
    }
