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


class OwedGradient:
    """One weight's gradient, to be added to its main_grad once, now or when a pipeline says so."""

    def __init__(self, point: str, weight, wgrad, versions: Callable, add: Callable):
        """``add(wgrad)`` does it, from what the ``PendingWgrad`` holds. ``versions(...)`` counts changes of tensors in
        place, as their framework knows them."""
        self.point, self.weight = point, weight
        self._lock, self._versions_of = Lock(), versions
        self._work = wgrad, add  # None once it is done: whoever keeps this keeps no activations
        self._versions = versions(wgrad.saved_x, wgrad.dout)

    def __call__(self) -> None:
        with self._lock:
            if self._work is None:
                raise RuntimeError(f"run_wgrad: called again for {self.point}, whose gradient would count twice")
            wgrad, add = self._work
            if self._versions_of(wgrad.saved_x, wgrad.dout) != self._versions:
                raise RuntimeError(
                    "run_wgrad: x or the gradient of the output changed in place after backward, but the gradient of "
                    f"{self.point} was still to be computed from them; clone them first"
                )
            add(wgrad)
            self._work = None

    def settle(self) -> bool:
        """Whether it is done now; if not, a pipeline has taken it for later."""
        if _deferral.take(self.point, self.weight, self):
            return False
        self()
        return True


_deferral = _Deferral()
set_wgrad_deferral_hook = _deferral.set
may_be_deferred = _deferral.is_set
