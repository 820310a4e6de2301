"""``python -m sat_lens`` is ``sat-lens``; what torchrun starts."""

from __future__ import annotations

import sys

from sat_lens.cli import main

if __name__ == "__main__":
    sys.exit(main())
