"""Settings for all tests."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

from tests.runs import ALL_ON_GPU, GPU_BACKENDS, INTERPRETED, RUNS, Run, name_of

# On tensors this small a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)

if INTERPRETED:
    from triton.runtime import interpreter

    # It prepares the language anew for each call of each function; once per launch is enough, and three times as fast.
    _prepare, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    _prepared: dict[Any, Any] = {}

    def _prepare_once(fn: Any) -> Any:
        if fn not in _prepared:
            _prepared[fn] = _prepare(fn)
        return _prepared[fn]

    def _launch_prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        _prepared.clear()
        return _launch(self, *args, **kwargs)

    interpreter._patch_lang = _prepare_once
    interpreter.GridExecutor.__call__ = _launch_prepared


@pytest.fixture(params=RUNS, ids=name_of)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Each backend on each device (:mod:`tests.runs`)."""
    chosen: Run = request.param
    chance = zlib.crc32(request.node.name.encode())
    if chosen.device == "cuda" and chance >> 2 & 7 and not ALL_ON_GPU:
        pytest.skip("one case in eight runs on a GPU, unless SOFIM_ALL_GPU_TESTS=1")
    single = bool(chance & 1) if chosen.single is None else chosen.single
    ready = bool(chance & 2) if chosen.ready is None else chosen.ready
    if chosen.backend in GPU_BACKENDS:
        monkeypatch.setattr(GPU_BACKENDS[chosen.backend], "SINGLE_LAUNCH", single)
    return chosen._replace(single=single, ready=ready)
