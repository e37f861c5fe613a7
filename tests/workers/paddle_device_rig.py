"""The device plugin over its stand-in for CUDA, in a Paddle process: {check: what was wrong, or None} as JSON.

paddle_device_rig.py empty      a first call without a token, and nothing else before it
paddle_device_rig.py rig        memory, views, devices, streams, counters
"""

import json
import sys
import traceback

import numpy as np
import paddle
from gpu_paddle import rig

CHECKS = {}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "int16", "uint8", "bool", "float8_e4m3fn")


def check(function):
    CHECKS[function.__name__] = function
    return function


def drawn(shape, dtype="float32", seed=0):
    """On the CPU, of values that each type holds."""
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 64, shape)
    return paddle.to_tensor(values.astype(np.float32), place=paddle.CPUPlace()).astype(dtype)


def same(found, wanted, what=""):
    found, wanted = found.cpu(), wanted.cpu()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (what, found.shape, wanted.shape)
    if found.dtype in (paddle.bfloat16, paddle.float8_e4m3fn):
        found, wanted = found.astype("float32"), wanted.astype("float32")
    np.testing.assert_array_equal(found.contiguous().numpy(), wanted.contiguous().numpy(), err_msg=str(what))


VIEWS = {
    "transposed": lambda t: t.transpose([2, 0, 1]),
    "every other": lambda t: t[:, ::2],
    "backwards cut": lambda t: t[1:3, 1:, 2:5],
    "cut and transposed": lambda t: t[1:].transpose([1, 2, 0])[2:],
    "diagonal": lambda t: paddle.diagonal(t, axis1=0, axis2=1),
    "expanded": lambda t: t[:, :1].expand([4, 5, 6]),
    "as_strided": lambda t: paddle.as_strided(t, [3, 2], [7, 2], 0),
    "unfolded": lambda t: t.unfold(2, 3, 2),
    "nothing of it": lambda t: t[2:2],
    "one": lambda t: t[3, 4, 5],
}


@check
def views_read(device):
    """What a view says of itself, and what becomes of it on its way into memory of its own."""
    for dtype in DTYPES:
        here = drawn([4, 5, 6], dtype)
        there = here.to(device)
        for name, view in VIEWS.items():
            if name == "expanded" and dtype == "float8_e4m3fn":
                continue  # Paddle has no kernel for it
            mine, wanted = view(there), view(here)
            assert mine.strides == wanted.strides, (dtype, name, mine.strides, wanted.strides)
            assert mine.is_contiguous() == wanted.is_contiguous(), (dtype, name)
            made = mine.contiguous()
            assert made.is_contiguous() and str(made.place) == str(there.place), (dtype, name)
            same(made, wanted.contiguous(), f"{dtype}, {name}")
            same(mine.clone(), wanted.contiguous(), f"{dtype}, clone of {name}")


@check
def views_written(device):
    """A write through a view changes those elements and no other."""
    for dtype in ("float32", "bfloat16", "int64", "uint8"):
        for name in ("transposed", "every other", "cut and transposed", "as_strided"):
            results = []
            for place in ("cpu", device):
                base = drawn([4, 5, 6], dtype).to(place)
                view = VIEWS[name](base)
                view.copy_(drawn(view.shape, dtype, seed=1).to(place))
                results.append(base)
            same(results[1], results[0], f"{dtype}, {name}")
    for place in ("cpu", device):
        base = drawn([4, 6]).to(place)
        base[1:3, ::2] = drawn([2, 3], seed=2).to(place)
        base.t().add_(drawn([6, 4], seed=3).to(place))
        results[place == device] = base
    same(results[1], results[0], "setitem and add_ to a transposed view")


@check
def memory_comes_back(device):
    """What is let go is handed out again, for as long as its size is asked for, and the driver hears of neither."""
    plugin = rig.Plugin()
    for _ in range(3):  # Paddle's own allocator takes chunks of its own size first
        paddle.zeros([1 << 20], dtype="uint8")
    before, held, used = plugin.counts(), plugin.bytes_held(), plugin.bytes_in_use()
    for _ in range(50):
        first, second = paddle.zeros([1 << 20], dtype="uint8"), paddle.ones([1 << 18], dtype="float32")
        assert first.data_ptr() != second.data_ptr()
        del first, second
    after = plugin.counts()
    assert after["allocations"] - before["allocations"] <= 2, (before, after)
    assert plugin.bytes_held() - held <= 4 << 20 and plugin.bytes_in_use() - used <= 4 << 20
    kept = [paddle.full([1 << 18], number, dtype="float32") for number in range(8)]
    assert len({tensor.data_ptr() for tensor in kept}) == 8
    for number, tensor in enumerate(kept):
        same(tensor, paddle.full([1 << 18], number, dtype="float32"))
    assert plugin.bytes_held() >= plugin.bytes_in_use()


@check
def blocks_are_handed_out_again(device):
    """With FLAGS_free_idle_chunk=1 Paddle gives back each chunk that is idle: the plugin keeps it, and a next one of
    its size costs no call of the driver."""
    plugin, size = rig.Plugin(), 24 << 20
    first = paddle.empty([size], dtype="uint8")
    where, used, held, before = first.data_ptr(), plugin.bytes_in_use(), plugin.bytes_held(), plugin.counts()
    del first
    assert plugin.bytes_in_use() <= used - size and plugin.bytes_held() == held
    second = paddle.empty([size], dtype="uint8")
    assert second.data_ptr() == where and plugin.bytes_in_use() == used and plugin.bytes_held() == held
    third = paddle.empty([size], dtype="uint8")
    assert third.data_ptr() != where and plugin.bytes_held() >= held + size
    del second, third
    assert plugin.counts()["allocations"] == before["allocations"] + 1
    assert plugin.library.paddle_cuda_device_trim(0) == 0
    assert plugin.bytes_held() == plugin.bytes_in_use() <= used - size
    assert plugin.counts()["releases"] >= before["releases"] + 2


@check
def too_much_is_an_error(device):
    try:
        paddle.empty([2 << 30], dtype="uint8")  # the stand-in has 1 GiB
    except (OSError, MemoryError, RuntimeError):
        pass
    else:
        raise AssertionError("2 GiB of 1")
    same(paddle.ones([4]), paddle.ones([4]).cpu())  # and it goes on


@check
def two_devices(device):
    name = device.partition(":")[0]
    plugin = rig.Plugin()
    assert paddle.device.get_available_custom_device() == [f"{name}:0", f"{name}:1"]
    used = plugin.bytes_in_use(1)
    value = drawn([300, 7])
    first = value.to(f"{name}:0")
    second = first.to(f"{name}:1")
    assert [str(t.place) for t in (first, second)] == [f"Place({name}:0)", f"Place({name}:1)"]
    assert plugin.bytes_in_use(1) > used
    same(second, value)
    same(second.t().contiguous(), value.t())  # while device 0 is current
    same((second + second).to(f"{name}:0"), value + value)
    paddle.set_device(f"{name}:1")
    made = paddle.full([5], 3.0)
    assert str(made.place) == f"Place({name}:1)"
    same(first.t().contiguous(), value.t())


@check
def layer_on_another_device(device):
    """A node whose tensors are on the second device while the first is current."""
    from gpu_paddle.problem import TINY, inputs

    other = device.partition(":")[0] + ":1"
    wanted = rig.Layer(inputs(TINY), backend="naive").results()
    paddle.set_device(other)
    layer = rig.Layer(inputs(TINY), backend="naive")
    paddle.set_device(device)
    for name, value in layer.results().items():
        assert value.tobytes() == wanted[name].tobytes(), name
    assert layer.node.last_path.startswith(other.partition(":")[0])


@check
def copies_on_another_device(device):
    """Weight copies are made where the weights are, whichever device is current and whoever asks for them."""
    from gpu_paddle.problem import TINY, inputs

    from sonicmoe import cuda_driver

    paddle.set_device(device.partition(":")[0] + ":1")
    node = rig.Layer(inputs(TINY), "fp8", backend="naive").node
    made_on, make = [], node._store._make
    node._store._make = lambda *given: (made_on.append(cuda_driver.current_device()), make(*given))[1]
    for ask in (node.prequantize_weights, node.warmup):
        node.invalidate_caches()
        paddle.set_device(device)
        paddle.zeros([2])
        ask()
    assert made_on == [1, 1], made_on


@check
def streams_and_events(device):
    from sonicmoe.launch import current_stream

    plugin = rig.Plugin()
    x = drawn([64]).to(device)
    main = current_stream(x)
    assert main != 0
    before = plugin.counts()
    side = paddle.device.Stream(device)
    event = paddle.base.libpaddle.CustomDeviceEvent(device.partition(":")[0], 0)  # Paddle 3.3's own Event() fails here
    assert plugin.counts()["streams"] == before["streams"] + 1
    with paddle.device.stream_guard(side):
        assert current_stream(x) == side.stream_base.raw_stream != main
        y = x + x
        event.record(side.stream_base)
    assert current_stream(x) == main
    paddle.device.current_stream(device).stream_base.wait_event(event)
    same(y + x, drawn([64]) * 3)
    assert event.query()
    event.synchronize()
    side.synchronize()
    after = plugin.counts()
    assert after["synchronize stream"] > before["synchronize stream"]


@check
def counters(device):
    """What is counted as a wait is what waits: copies to the host do, kernels do not."""
    plugin, x = rig.Plugin(), drawn([64, 64]).to(device)

    def waits(work):
        before = plugin.counts()
        work()
        return sum(plugin.counts()[name] - before[name] for name in rig.WAITS)

    assert waits(lambda: [(x + x).t().contiguous(), paddle.zeros([4]), x.clone(), x.astype("bfloat16")]) == 0
    assert waits(lambda: paddle.device.synchronize(device)) >= 1
    assert waits(lambda: x.numpy()) >= 1
    assert waits(lambda: paddle.to_tensor(np.ones(4, np.float32), place=x.place)) >= 1
    assert waits(lambda: paddle.linalg.norm(x)) >= 1  # no kernel of its own: through the CPU


@check
def under_autocast(device):
    """The layer chooses its types itself: with ``auto_cast`` on it gives the bits that it gives without."""
    from gpu_paddle.problem import TINY, inputs

    from sonicmoe.ernie_compat import fused_grouped_w1_to_sonic, fused_sonic_w1_to_grouped, fused_transpose_w2_layout

    def narrowed():
        return paddle.amp.auto_cast(level="O2", dtype="float16", use_promote=False)

    value = drawn([4, 4, 4]) + 4097.0  # float16 has no 4097
    there = value.to(device)
    with narrowed():
        assert paddle.stack([there, there]).dtype == paddle.float16, "auto_cast does nothing here"
        for convert in (fused_grouped_w1_to_sonic, fused_sonic_w1_to_grouped, fused_transpose_w2_layout):
            same(convert(there), convert(value), convert.__name__)
    for recipe in ("bf16", "fp8_wgrad"):
        for fused in (False, True):
            wanted = rig.Layer(inputs(TINY), recipe, fused=fused, backend="naive").results()
            layer = rig.Layer(inputs(TINY), recipe, fused=fused, backend="naive")
            with narrowed():
                out = layer.step()
                layer.node.step()
            assert layer.parameters()[0].main_grad.dtype == paddle.float32
            found = {"out": rig.bits(out), "dx": rig.bits(layer.x.grad), "ds": rig.bits(layer.probs.grad)}
            for name, value in (found | layer.weight_gradients()).items():
                assert value.tobytes() == wanted[name].tobytes(), (recipe, fused, name)


# Layers that meet each part of ``paddle_layer``. The device has no product in 16 bits, for the shared expert.
EXPERT_PARALLEL = (
    dict(),
    dict(dtype="float32", shared_intermediate_size=64, balance_speed=0.01, overlap=3),
    dict(fp8_dispatch=True, fp8_combine_grad=True, recompute=True),
)
# Whose backward runs under it as well. Paddle's tape adds two gradients of one tensor, and without promotion narrows
# them there: that is no layer's to keep.
LEVELS = ((dict(level="O1"), True), (dict(level="O2"), True), (dict(level="O2", use_promote=False), False))


@check
def expert_parallel_under_autocast(device):
    """Router, dispatch, combine and balance: bits and types are those without ``auto_cast``."""
    from contextlib import nullcontext

    from sonicmoe import SonicMoEConfig
    from sonicmoe.ep.paddle_layer import ExpertParallelMoE

    value, dout = drawn([24, 128]) / 32 - 1, drawn([24, 128], seed=1) / 32 - 1
    sizes = dict(num_experts=4, num_experts_per_tok=2, hidden_size=128, intermediate_size=128, std=0.1)

    def results(options, dtype, narrowed=None, backward_too=False):
        layer = ExpertParallelMoE(**sizes, **options, config=SonicMoEConfig(backend="naive"))
        x = value.to(device).astype(dtype).detach()
        x.stop_gradient = False

        def backward():
            paddle.autograd.backward([out, aux], [dout.to(device).astype(dtype), paddle.to_tensor(0.5)])
            layer.sum_shared_gradients()
            layer.step()

        with paddle.amp.auto_cast(**narrowed, dtype="float16") if narrowed else nullcontext():
            out, aux = layer(x)
            if backward_too:
                backward()
        if not backward_too:
            backward()
        found = {"out": out, "aux": aux, "dx": x.grad, "load": layer.load}
        found |= {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
        found |= {f"main {name}": weight.main_grad for name, weight in layer.experts.named_parameters()}
        return found if layer.balance_steps is None else found | {"steps": layer.balance_steps}

    for options in EXPERT_PARALLEL:
        for dtype in ("float32", "bfloat16"):
            wanted = results(options, dtype)
            assert "router.weight" in wanted
            for narrowed, backward_too in LEVELS:
                found = results(options, dtype, narrowed, backward_too)
                assert found.keys() == wanted.keys()
                for name, tensor in found.items():
                    same(tensor, wanted[name], (options, dtype, narrowed, name))


def empty(device):
    """No address to ask the driver about."""
    from sonicmoe import SonicMoEConfig
    from sonicmoe.ernie_compat import run_sonic_moe
    from sonicmoe.launch import is_cuda

    x, ids, probs = (paddle.zeros([0, n], dtype=t) for n, t in ((128, "bfloat16"), (2, "int32"), (2, "float32")))
    assert x.data_ptr() in (0, None) and is_cuda(x)
    w1, w2 = paddle.zeros([4, 256, 128], dtype="bfloat16"), paddle.zeros([4, 128, 128], dtype="bfloat16")
    out = run_sonic_moe(x, ids, probs, 2, 4, w1, w2, fp8_config=SonicMoEConfig(backend="naive"))
    assert out.shape == [0, 128]


def main(group, device="sonicmoe_gpu:0"):
    said = {}
    for name, function in (CHECKS if group == "rig" else {"empty": empty}).items():
        paddle.set_device(device)
        try:
            function(device)
            said[name] = None
        except Exception:
            said[name] = traceback.format_exc()
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
