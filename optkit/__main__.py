"""``python -m optkit``."""

from __future__ import annotations

import sys

from optkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
