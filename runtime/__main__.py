"""The console script `runtime`, and `python -m polykern.runtime`.

Imports nothing before it can answer to Ctrl-C: what `cli` needs takes 0.05 s.
"""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from .cli import main as command_line
    except KeyboardInterrupt:
        return 130  # as cli.INTERRUPTED
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
