"""The backend that runs Triton kernels on GPUs.

``kernels`` has the kernels, ``launch`` launches them, ``pack`` makes the rows of addresses that they read, and
``workspace`` has the memory that they share. ``passes`` runs them pass by pass; ``step`` runs whole steps in one call.
"""

SINGLE_LAUNCH: bool | None = None
"""One launch per whole step (``True``), two (``False``), or one up to ``step.SINGLE_UP_TO`` (``None``). Read at each
step."""

from sofim_fused.backends.triton.passes import passes_for  # noqa: E402  (``step`` reads SINGLE_LAUNCH from here)

__all__ = ["SINGLE_LAUNCH", "passes_for"]
