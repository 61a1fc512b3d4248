"""Which of one's own source files have changed: what ``run.py --reload`` asks twice a second.

By modification time and size, of the modules that are imported right now; those
of Python itself and of installed packages are left out.  A file that is missing
has not changed: editors replace a file in two steps.  Knows no event loop.
"""

import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

Mark = tuple[int, int]


class Changes:
    """Compares with what was there when a file was first seen; ``also`` are files to watch besides the modules."""

    def __init__(self, also: Iterable[str] = ()) -> None:
        self._also = tuple(also)
        self._foreign = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
        self._seen: dict[str, Mark] = {}
        self.look()

    def __repr__(self) -> str:
        return f"Changes({len(self._seen)} files)"

    def files(self) -> set[str]:
        """What is watched at the moment."""
        modules = {str(path) for module in list(sys.modules.values()) if (path := getattr(module, "__file__", None))}
        return {path for path in modules if not path.startswith(self._foreign)}.union(self._also)

    def look(self) -> str | None:
        """A file that has changed since it was first seen, ``None`` if there is none."""
        for path in sorted(self.files()):
            try:
                status = Path(path).stat()
            except OSError:
                continue
            mark = (status.st_mtime_ns, status.st_size)
            if self._seen.setdefault(path, mark) != mark:
                return path
        return None


def files_of(fault: BaseException | None) -> set[str]:
    """The source files that an exception and its causes came through: where its mending will be seen."""
    found: set[str] = set()
    while fault is not None:
        found.update(frame.filename for frame in traceback.extract_tb(fault.__traceback__))
        if isinstance(fault, SyntaxError) and fault.filename:
            found.add(fault.filename)
        fault = fault.__cause__
    return {name for name in found if not name.startswith("<")}
