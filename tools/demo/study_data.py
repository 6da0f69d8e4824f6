"""Prepare what the first study needs: a small model, two domains, general texts for three roles, and questions.

    python tools/demo/study_data.py --out study_data

What it makes, and of what, is the list in `study/corpora.py`; docs/study/data.md tells about it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `demo` lies

    from demo.study.command import main

    sys.exit(main())
