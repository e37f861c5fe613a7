"""Lets a zero-bubble pipeline run weight gradients later than the rest of backward.

``hook(point, weight, run_wgrad) -> bool``: ``point`` is ``"w1"`` or ``"w2"``, ``run_wgrad()`` accumulates into
``weight.main_grad``. A hook that returns True has taken the work and owes one call of ``run_wgrad`` and the
parameter's backward hook after it; on False both happen at once.
"""

from collections.abc import Callable
from threading import Lock


class _Deferral:
    def __init__(self):
        self._lock = Lock()
        self._hook: Callable | None = None

    def set(self, hook: Callable | None) -> None:
        if hook is not None and not callable(hook):
            raise TypeError(f"hook: got {type(hook).__name__}, need a callable or None")
        with self._lock:
            self._hook = hook

    def is_set(self) -> bool:
        return self._hook is not None

    def take(self, point: str, weight, run_wgrad: Callable) -> bool:
        """Offer one weight gradient; True if the hook keeps it for later."""
        with self._lock:
            hook = self._hook
        return bool(hook(point, weight, run_wgrad)) if hook is not None else False


_deferral = _Deferral()
set_wgrad_deferral_hook = _deferral.set
offer_wgrad = _deferral.take
may_be_deferred = _deferral.is_set
