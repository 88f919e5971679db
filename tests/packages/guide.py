"""`python guide.py PAGE` runs the Python blocks of a page, in order, as one program."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def run_page(page: Path) -> int:
    """Run a page's blocks; how many there are."""
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        # Empty lines keep the page's line numbers in a traceback.
        above = "\n" * (text.count("\n", 0, block.start()) + 1)
        exec(compile(above + block.group(1), str(page), "exec"), names)
    return len(blocks)


if __name__ == "__main__":
    print(run_page(Path(sys.argv[1])), "blocks ran")
