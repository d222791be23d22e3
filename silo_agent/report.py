"""What a command measured, as a JSON file that other programs read."""

import dataclasses
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from codec.errors import SaveError


def settings_of(*options: Any) -> dict[str, Any]:
    """The fields of one or several dataclasses of options, as one."""
    return {name: value for part in options for name, value in dataclasses.asdict(part).items()}


def write_report(path: Path | None, bench: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Write `{"bench", "command", "machine", "settings", "results"}` to `path`, whole or not at all.

    Does nothing without a path. Raises `SaveError` if it cannot be written.
    """
    if path is None:
        return
    report = {
        "bench": bench,
        "command": " ".join(["trunkline", *sys.argv[1:]]),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        },
        "settings": settings,
        "results": results,
    }
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(report, file, indent=2, default=os.fspath)  # Options hold paths.
            file.write("\n")
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise SaveError(f"{path} cannot be written: {error.strerror}") from None
