"""What is made on one stream and read on another: the orders that the streams get. A GPU shows that they suffice."""

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe.expert_mlp import PendingWgrad
    from sonicmoe.functional import streams
    from sonicmoe.gemm.sm90_fp8 import Gradient, TokenMajor
    from sonicmoe.quant.formats import QuantTensor


class Stream:
    def __init__(self, handle):
        self.handle, self.waits = handle, []

    def record_event(self):
        return f"event of {self.handle}"

    def wait_event(self, event):
        self.waits.append(event)


class Tensor:
    is_cuda, device = True, "cuda:0"

    def __init__(self):
        self.read_on = []

    def record_stream(self, stream):
        self.read_on.append(stream)


def on(monkeypatch, stream):
    """From now on this stream is the current one."""
    monkeypatch.setattr(streams, "current_stream", lambda tensor: stream.handle)
    monkeypatch.setattr(streams.torch.cuda, "current_stream", lambda device: stream)


def test_another_stream_waits_and_holds_the_memory(monkeypatch):
    first, second, tensors = Stream(0), Stream(7), [Tensor(), Tensor()]
    monkeypatch.setattr(streams, "tensors_in", list)
    on(monkeypatch, first)
    handover = streams.Handover(Tensor())
    handover.take(tensors)
    assert not first.waits and not tensors[0].read_on  # at home there is nothing to do
    on(monkeypatch, second)
    handover.take(tensors)
    assert second.waits == ["event of 0"] and [tensor.read_on for tensor in tensors] == [[second], [second]]


def test_a_cpu_has_no_streams():
    streams.Handover(torch.zeros(1)).take([torch.zeros(1)])


def test_tensors_of_what_the_engine_holds():
    one = torch.zeros(1)
    assert streams.tensors_in(one) == [one] and streams.tensors_in(None) == []
    tensors = [torch.zeros(1) for _ in range(8)]
    x, dout, dz, pa = (QuantTensor(*tensors[:2], (1, 128)), tensors[2], Gradient(None, TokenMajor(*tensors[3:5])),
                       TokenMajor(*tensors[5:7]))  # fmt: skip
    found = streams.tensors_in(PendingWgrad(x, dout, dz, pa, (tensors[7], 3), None))
    assert [tensor is wanted for tensor, wanted in zip(found, tensors, strict=True)] == [True] * 8
