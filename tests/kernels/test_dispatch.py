from __future__ import annotations

import pytest
import torch

from prismserve.kernels import dispatch


def test_cpu_tensors_take_the_reference():
    assert not dispatch.use_triton(torch.zeros(1))
    assert not dispatch.use_triton_on(torch.device("cpu"))


def test_without_triton_the_interpreter_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"), dispatch.interpreted():
        pass
    assert not dispatch.use_triton_on(torch.device("cuda"))
