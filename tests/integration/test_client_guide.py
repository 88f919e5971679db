"""The code blocks of the trainer guide, run in order as one program."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "trainer-guide.md"


def test_the_guides_code_runs() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 8
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        # Empty lines keep the guide's line numbers in a traceback.
        above = "\n" * (text.count("\n", 0, block.start()) + 1)
        exec(compile(above + block.group(1), str(GUIDE), "exec"), names)
