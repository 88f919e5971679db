"""How soon a thread gets the interpreter back when its wait is over."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Final

_PROMPT_S: Final = 1e-4
_HALF_A_MICROSECOND_S: Final = 5e-7


class PromptReturn:
    """Lowers the interpreter's switch interval as long as any thread is inside.

    A thread that wakes while another one computes gets the interpreter only when that one gives it
    away or is asked to, which by default is after 5 ms. The interval is the process's, so there is
    one of these in it. What others set meanwhile is left as it is.
    """

    def __init__(self) -> None:
        # A signal's handler may come in while its own thread holds the lock.
        self._lock = threading.RLock()
        self._inside = 0
        self._before_s = 0.0
        self._lowered_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before_s + _HALF_A_MICROSECOND_S, _PROMPT_S))
                self._lowered_s = sys.getswitchinterval()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._inside == 1:
                self._restore()
            self._inside = max(self._inside - 1, 0)

    def reset(self) -> None:
        """Forget, in a forked child, who was inside in the parent."""
        self._lock = threading.RLock()
        if self._inside:
            self._restore()
            self._inside = 0

    def _restore(self) -> None:
        if sys.getswitchinterval() == self._lowered_s:
            # What is set is cut to whole microseconds.
            sys.setswitchinterval(self._before_s + _HALF_A_MICROSECOND_S)


PROMPT_RETURN: Final = PromptReturn()
"""That of this process."""
