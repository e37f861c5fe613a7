"""What needs no second rank: waits, bytes on the way, balance, checkpoints, callers' mistakes."""

import copy
import json
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import paddle
import pytest
from paddle.base import framework

# First: it makes `import torch` mean Paddle in the rest.
from sonicmoe.ep import paddle_layer  # isort: skip
from sonicmoe import SonicMoEConfig
from sonicmoe.ep import balance, checkpoint, layout, paddle_communicator, paddle_tape, words
from sonicmoe.ep.call import Wire
from sonicmoe.ep.communicator import Alone
from sonicmoe.ep.transport import AllToAll

T, K, E, H = 24, 2, 4, 128
SIZES = dict(num_experts=E, num_experts_per_tok=K, hidden_size=H, intermediate_size=64)


class Counting(Alone):
    """Notes the bytes of each exchange."""

    def __init__(self):
        self.sent = []

    def begin_exchange(self, rows, sent, received):
        self.sent.append(int(np.prod(rows.shape)) * 4)
        return super().begin_exchange(rows, sent, received)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    x = paddle.to_tensor(rng.standard_normal((T, H)).astype(np.float32)).astype("bfloat16")
    probs = paddle.to_tensor(rng.random((T, K)).astype(np.float32))
    x.stop_gradient = probs.stop_gradient = False
    return x, paddle.to_tensor(indices), probs


def there_and_back(comm, wire, takes_handle=True):
    """``takes_handle``: whether the experts' backward takes the gradient out of it, as the node does."""
    x, indices, probs = problem()
    (call,) = paddle_tape.open_calls([(x, probs, indices)], E, AllToAll(comm), wire)
    rows, row_probs = paddle_tape.finish_dispatch(paddle_tape.begin_dispatch(x, probs, call), x, call)
    y = (rows.astype("float32") * 0 + row_probs.sum(-1, keepdim=True)).astype("bfloat16")
    if wire.fp8_combine_grad and takes_handle:
        y.register_hook(lambda grad: call.combine_grad_handle.clear())
    out = paddle_tape.finish_combine(paddle_tape.begin_combine(y, call), call)
    out.backward(paddle.ones_like(out))


def test_fp8_halves_what_travels_as_fp8_and_no_more():
    beside, wide, narrow, scales = 8 * K * T, 2 * H * T, H * T, 4 * (H // 128) * T
    expected = {
        # rows and what rides beside them; outputs; their gradients; dx and the scores' gradients
        Wire(): [wide, beside, wide, wide, wide, 4 * K * T],
        Wire(fp8_dispatch=True): [narrow, beside + scales, wide, wide, wide, 4 * K * T],
        Wire(fp8_combine_grad=True): [wide, beside, wide, narrow, scales, wide, 4 * K * T],
    }
    for wire, sent in expected.items():
        comm = Counting()
        there_and_back(comm, wire)
        assert comm.sent == sent, wire


def test_experts_that_leave_the_handle_are_an_error():
    """What reaches them over the tape are codes without scales. Paddle makes an OSError of what a backward raises."""
    with pytest.raises(OSError, match="combine_grad_handle: the experts' backward left the gradient of y in it"):
        there_and_back(Alone(), Wire(fp8_combine_grad=True), takes_handle=False)


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_plan_waits_for_the_device_once(monkeypatch, pieces):
    x, indices, probs = problem()
    waits = []
    for name in ("tolist", "numpy", "item", "__int__", "__bool__", "__float__", "__len__", "__index__"):
        original = getattr(paddle.Tensor, name)

        def seen(self, *args, _name=name, _original=original, **kwargs):
            waits.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(paddle.Tensor, name, seen)
    paddle_tape.open_calls([(x, probs, indices)] * pieces, E, AllToAll(Alone()))
    assert waits[0] == "tolist" and set(waits[1:]) <= {"numpy"} and len(waits) <= 2  # Paddle's tolist calls numpy


def values_of(tensor):
    return tensor.astype("float32").numpy()


def test_words_are_the_same_bytes():
    values = np.arange(6 * 128, dtype=np.float32).reshape(6, 128)
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        given = paddle.to_tensor(values).astype(dtype)
        sent = words.to_words(given)
        assert sent.dtype == paddle.int32 and sent.shape == [6, words.words_in(128, dtype)]
        back = words.from_words(sent, dtype)
        np.testing.assert_array_equal(values_of(back), values_of(given))
        # A slice, which lies within other memory.
        np.testing.assert_array_equal(words.to_words(given[2:5]).numpy(), sent.numpy()[2:5])
        empty = words.from_words(words.to_words(given[:0]), dtype)
        assert empty.shape == [0, 128] and empty.dtype == given.dtype


def test_balance_changes_the_choice_and_nothing_else():
    logits = paddle.to_tensor(np.array([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]], np.float32))
    assert balance.choose(logits, None, 2).tolist() == [[0, 1], [0, 1]]
    away = paddle.to_tensor(np.array([-1.0, 0.0, 0.0, 0.5], np.float32))
    assert balance.choose(logits, away, 2).tolist() == [[3, 1], [3, 1]]
    assert balance.change(paddle.to_tensor([9, 3, 6, 6])).tolist() == [-1, 1, 0, 0]


def test_balance_evens_the_load():
    """Tokens have much in common: without an offset some experts would take most of them."""
    paddle.seed(0)
    x = paddle.randn([1, H]) * 2 + paddle.randn([256, H])
    layer = paddle_layer.ExpertParallelMoE(**SIZES, std=0.05, balance_speed=0.01)
    loads = []
    for _ in range(60):
        with paddle.no_grad():
            layer(x)
        loads.append(layer.load.numpy() / (256 * K / E))
        layer.step()
    late = np.mean(loads[-10:], axis=0)
    assert loads[0].max() > 1.5 and late.max() < 1.2 and late.min() > 0.8, (loads[0], late)
    assert int(layer.load.sum()) == 0 and "balance_steps" in layer.state_dict()
    steps = layer.balance_steps.tolist()
    layer.bfloat16()
    assert layer.balance_steps.tolist() == steps and max(map(abs, steps)) > 3


def test_one_rank_is_the_node():
    """Router, node and shared expert put together by hand: the same bits, but for sums of gradients."""
    layer = paddle_layer.ExpertParallelMoE(**SIZES, std=0.1, shared_intermediate_size=64)
    x, dout = paddle.randn([T, H]), paddle.randn([T, H])
    found = []
    for by_hand in (False, True):
        given = x.clone()
        given.stop_gradient = False
        if by_hand:
            logits = paddle.matmul(given, layer.router.weight)
            values, chosen = paddle.topk(logits, K, axis=-1)
            counts = np.bincount(chosen.numpy().ravel(), minlength=E).tolist()
            probs = paddle.nn.functional.softmax(values, axis=-1)
            out = layer.node(given.astype("bfloat16"), counts, chosen, probs).astype("float32") + layer.shared(given)
            share = paddle.to_tensor(np.array(counts, np.float32) / (T * K))
            aux = E * (paddle.nn.functional.softmax(logits, axis=-1).mean(0) * share).sum()
        else:
            out, aux = layer(given)
        paddle.autograd.backward([out, aux], [dout, paddle.to_tensor(0.5)])
        layer.step()
        grads = {"x": given.grad, "router": layer.router.weight.grad, "up": layer.shared.up_gate_proj.weight.grad}
        grads |= {name: weight.main_grad for name, weight in layer.experts.named_parameters()}
        found.append({name: np.array(tensor.numpy()) for name, tensor in ({"out": out, "aux": aux} | grads).items()})
        layer.clear_gradients()
        for weight in layer.experts.parameters():
            weight.main_grad = None
    for name, value in found[1].items():
        exact = name == "out" or name.endswith("proj.weight")
        error = np.linalg.norm(found[0][name] - value) / np.linalg.norm(value)
        assert error == 0 if exact else error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_dispatches_again(recompute, monkeypatch):
    seen, begin = [], AllToAll.begin_dispatch
    monkeypatch.setattr(AllToAll, "begin_dispatch", lambda self, *args: seen.append(1) or begin(self, *args))
    layer = paddle_layer.ExpertParallelMoE(**SIZES, recompute=recompute)
    out, _ = layer(paddle.randn([T, H]))
    assert len(seen) == 1
    out.sum().backward()
    assert len(seen) == 1 + recompute


def test_recompute_runs_again_what_ran():
    """Whatever is active when backward comes."""
    found, x, dout = [], paddle.randn([T, H]), paddle.randn([T, H])
    for recompute in (False, True):
        layer = paddle_layer.ExpertParallelMoE(**{**SIZES, "intermediate_size": 128}, std=0.1, recompute=recompute)
        given = x.clone()
        given.stop_gradient = False
        with SonicMoEConfig(use_fp8=True, fp8_wgrad=True).activate():
            out, _ = layer(given)
        out.backward(dout)
        assert "fp8" in layer.node.last_path
        layer.step()
        weights = [weight for weight in layer.experts.parameters() if getattr(weight, "main_grad", None) is not None]
        found.append([tensor.numpy() for tensor in (given.grad, *(weight.main_grad for weight in weights))])
    for again, once in zip(*found, strict=True):
        np.testing.assert_array_equal(again, once)


@contextmanager
def autocast_on_a_cpu(level):
    """Paddle turns ``auto_cast`` off there. Told that it is on, it gives operators float32 for 16 bits, whose bytes
    then are others. On a device: ``expert_parallel_under_autocast`` of ``paddle_device_rig.py``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with paddle.amp.auto_cast(level=level, dtype="bfloat16"):
            tracer = framework._dygraph_tracer()
            tracer._amp_level, tracer._amp_dtype = getattr(framework.core.AmpLevel, level), "bfloat16"
            assert paddle.add(*[paddle.ones([2], dtype="bfloat16")] * 2).dtype == paddle.float32
            yield


@pytest.mark.parametrize("options", [{}, dict(recompute=True, fp8_dispatch=True), dict(overlap=2, balance_speed=0.01)])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_autocast_changes_nothing(level, options):
    found, x, dout = [], paddle.randn([T, H]).astype("bfloat16"), paddle.randn([T, H]).astype("bfloat16")
    for active in (nullcontext(), autocast_on_a_cpu(level)):
        layer = paddle_layer.ExpertParallelMoE(**{**SIZES, "intermediate_size": 128}, std=0.1, **options)
        given = x.detach()
        given.stop_gradient = False
        with active:
            out, aux = layer(given)
            paddle.autograd.backward([out, aux], [dout, paddle.to_tensor(0.5)])
            layer.sum_shared_gradients()
            layer.step()
        grads = [given.grad, layer.router.weight.grad, *(weight.main_grad for weight in layer.experts.parameters())]
        found.append([out, aux, layer.load, *grads])
    for plain, narrowed in zip(*found, strict=True):
        assert narrowed.dtype == plain.dtype
        np.testing.assert_array_equal(values_of(narrowed), values_of(plain))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", ["router", "experts"])
def test_frozen_parts(frozen, recompute):
    layer = paddle_layer.ExpertParallelMoE(**SIZES, std=0.1, shared_intermediate_size=64, recompute=recompute)
    for weight in [layer.router.weight] if frozen == "router" else layer.experts.parameters():
        weight.stop_gradient = True
    (layer(paddle.randn([T, H]))[0] ** 2).mean().backward()
    layer.step()
    assert (layer.router.weight.grad is None) == (frozen == "router")
    assert layer.shared.down_proj.weight.grad is not None
    grads = [getattr(weight, "main_grad", None) for weight in layer.experts.parameters()]
    assert all((grad is None) == (frozen == "experts") for grad in grads)


def test_recompute_of_a_frozen_layer_wants_no_gradient():
    layer = paddle_layer.ExpertParallelMoE(**SIZES, shared_intermediate_size=64, recompute=True)
    for weight in layer.parameters():
        weight.stop_gradient = True
    assert layer(paddle.randn([T, H]))[0].stop_gradient


def test_a_layer_without_gradients_keeps_nothing():
    layer = paddle_layer.ExpertParallelMoE(**SIZES)
    x = paddle.randn([T, H])
    out, aux = layer(x)
    with paddle.no_grad():
        again, _ = layer(x)
    np.testing.assert_array_equal(again.numpy(), out.numpy())
    assert again.stop_gradient and not out.stop_gradient and aux.shape == []
    assert layer(x.reshape([4, 6, H]))[0].shape == [4, 6, H]


def results_of(layer, x, dout):
    """Everything of one step, whose gradients are then gone."""
    given = x.clone()
    given.stop_gradient = False
    out, aux = layer(given)
    paddle.autograd.backward([out, aux], [dout, paddle.to_tensor(0.5)])
    load = layer.load.tolist()
    layer.step()
    found = [out, given.grad, layer.router.weight.grad]
    found += [
        weight.main_grad for weight in layer.experts.parameters() if getattr(weight, "main_grad", None) is not None
    ]
    layer.clear_gradients()
    for weight in layer.experts.parameters():
        weight.main_grad = None
    return [np.array(tensor.astype("float32").numpy()) for tensor in found], load, layer.balance_steps.tolist()


@pytest.mark.parametrize("use_fp8", [False, True])
def test_a_copied_layer_is_another(use_fp8):
    sizes, config = {**SIZES, "intermediate_size": 128}, SonicMoEConfig(use_fp8=use_fp8)
    layer = paddle_layer.ExpertParallelMoE(**sizes, std=0.1, balance_speed=0.01, config=config)
    x, dout = paddle.randn([T, H]), paddle.randn([T, H])
    waiting, _ = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.load.tolist() == layer.load.tolist() and sum(twin.load.tolist()) == T * K
    waiting.backward(dout)
    assert layer.node.has_pending_grads and not twin.node.has_pending_grads
    layer.node.discard_grads()
    layer.clear_gradients()
    first = results_of(layer, x, dout)
    np.testing.assert_equal(results_of(twin, x, dout), first)
    untouched = copy.deepcopy(layer)
    twin.set_expert_tensors({kind: [w * 2 for w in tensors] for kind, tensors in twin.expert_tensors().items()})
    changed = results_of(twin, x, dout)
    np.testing.assert_equal(results_of(layer, x, dout), results_of(untouched, x, dout))
    assert not np.array_equal(changed[0][0], results_of(layer, x, dout)[0][0])


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


class RankOf(Alone):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def save_all(folder, ranks, n_experts=8):
    files = checkpoint.paddle_files()
    held = n_experts // ranks
    for rank in reversed(range(ranks)):  # rank 0 last: without a barrier, it must find the others' files
        mine = range(rank * held, (rank + 1) * held)
        experts = {"w": [paddle.full([2], float(e)) for e in mine]}
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder, RankOf(rank, ranks), files, {"router": paddle.ones([1])}, experts, mine)
    return files


@pytest.mark.parametrize("writers, readers", [(2, 4), (4, 2), (1, 8), (8, 1), (4, 4)])
def test_each_reader_gets_its_own_experts(tmp_path, writers, readers):
    files = save_all(tmp_path / "saved", writers)
    for rank in range(readers):
        held = range(rank * 8 // readers, (rank + 1) * 8 // readers)
        shared, experts = checkpoint.load(tmp_path / "saved", files, held)
        assert shared["router"].tolist() == [1.0]
        assert [tensor.tolist() for tensor in experts["w"]] == [[float(e)] * 2 for e in held]


def test_an_unfinished_checkpoint_is_none(tmp_path):
    files = save_all(tmp_path / "saved", 2)
    (tmp_path / "saved" / "index.json").unlink()
    with pytest.raises(ValueError, match="folder: .* has no index.json; no checkpoint, or one that was never finished"):
        checkpoint.load(tmp_path / "saved", files, range(0, 4))


def test_a_checkpoint_of_fewer_experts_is_an_error(tmp_path):
    files = save_all(tmp_path / "saved", 2)
    assert json.loads((tmp_path / "saved" / "index.json").read_text()) == {
        "experts-0-of-2": [0, 4],
        "experts-1-of-2": [4, 8],
    }
    with pytest.raises(ValueError, match="held: got experts up to 11, but .* has 8 experts"):
        checkpoint.load(tmp_path / "saved", files, range(6, 12))
    with pytest.raises(ValueError, match=r"experts\['w'\]: got 3 values, need one for each of 4 experts"):
        checkpoint.save(tmp_path / "other", Alone(), files, {}, {"w": [1, 2, 3]}, range(4))


def test_a_name_that_some_experts_lack_is_an_error(tmp_path):
    """As when an optimizer has met only some of them: what the others have must not get lost."""
    (tmp_path / "saved").mkdir()
    files = checkpoint.paddle_files()
    for rank in (1, 0):
        experts = {"w": [paddle.ones([1])] * 2} | ({"moment": [paddle.ones([1])] * 2} if rank else {})
        checkpoint.save(tmp_path / "saved", RankOf(rank, 2), files, {"step": 1}, experts, range(2 * rank, 2 * rank + 2))
    assert list(checkpoint.load(tmp_path / "saved", files, range(2, 4))[1]) == ["w", "moment"]
    wanted = r"folder: .* has \['moment', 'w'\] for expert 2, but \['w'\] for expert 0"
    with pytest.raises(ValueError, match=wanted):
        checkpoint.load(tmp_path / "saved", files, range(4))


# ---- Callers' mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    x, indices, probs = problem()
    with pytest.raises(ValueError, match="n_experts: got 6, need a multiple of 4, the ranks that share them"):
        layout.experts_of_rank(6, 0, 4)
    with pytest.raises(TypeError, match="indices: got dtype float32, need int32 or int64"):
        paddle_tape.open_calls([(x, probs, indices.astype("float32"))], E, AllToAll(Alone()))
    with pytest.raises(ValueError, match=r"indices: got shape \[48\], need 2 dimensions \[T, K\]"):
        paddle_tape.open_calls([(x, probs, indices.reshape([-1]))], E, AllToAll(Alone()))
    with pytest.raises(ValueError, match=r"probs: got shape \[24, 1\], need \[24, 2\]"):
        paddle_tape.open_calls([(x, probs[:, :1], indices)], E, AllToAll(Alone()))
    with pytest.raises(TypeError, match="probs: got dtype bfloat16, need float32"):
        paddle_tape.open_calls([(x, probs.astype("bfloat16"), indices)], E, AllToAll(Alone()))
    with pytest.raises(ValueError, match="fp8_dispatch: got True with 64 channels, need a multiple of 128"):
        paddle_layer.ExpertParallelMoE(**{**SIZES, "hidden_size": 64}, fp8_dispatch=True)
    with pytest.raises(ValueError, match="num_experts_per_tok: got 5, need at most num_experts, 4"):
        paddle_layer.ExpertParallelMoE(**{**SIZES, "num_experts_per_tok": 5})
    with pytest.raises(ValueError, match=r"hidden_states: got shape \[3, 64\], need \[..., H\] with H=128"):
        paddle_layer.ExpertParallelMoE(**SIZES)(paddle.zeros([3, 64]))
    with pytest.raises(TypeError, match="hidden_states: got dtype int32, need bfloat16 or float16 or float32"):
        paddle_layer.ExpertParallelMoE(**SIZES)(paddle.ones([3, H], dtype="int32"))
    for speed, kind in ((float("nan"), ValueError), (-0.1, ValueError), (float("inf"), ValueError), ("0.1", TypeError)):
        with pytest.raises(kind, match="balance_speed: got .*, need a"):
            paddle_layer.ExpertParallelMoE(**SIZES, balance_speed=speed)
    with pytest.raises(TypeError, match="fp8_dispatch: got 'no', need True or False"):
        paddle_layer.ExpertParallelMoE(**SIZES, fp8_dispatch="no")
    with pytest.raises(ValueError, match="overlap: got 0, need at least 1"):
        paddle_layer.ExpertParallelMoE(**SIZES, overlap=0)


def test_rows_are_those_of_the_call():
    """Others would be read as if they were: too many in silence."""
    x, indices, probs = problem()

    def opened(x=x):
        return paddle_tape.open_calls([(x, probs, indices)], E, AllToAll(Alone()))[0]

    for given, wanted in (
        (x.astype("float64"), "x: got dtype float64, need bfloat16 or float16 or float32"),
        (x.astype("float8_e4m3fn"), "x: got dtype float8_e4m3fn, need bfloat16 or float16 or float32"),
        (x.reshape([T, 2, H // 2]), r"x: got shape \[24, 2, 64\], need 2 dimensions \[rows, channels\]"),
        (x[:, :3], "x: got 3 channels, need a multiple of 2, whole words of 4 bytes"),
        (None, "x: got NoneType, need a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=wanted):
            opened(given)
    with pytest.raises(ValueError, match="n_experts: got 0, need at least 1"):
        paddle_tape.open_calls([(x, probs, indices)], 0, AllToAll(Alone()))
    twice = paddle.concat([x, x])
    with pytest.raises(ValueError, match=r"x: got shape \[48, 128\], need \[24, 128\] .*the call was opened for"):
        paddle_tape.begin_dispatch(twice, probs, opened())
    with pytest.raises(TypeError, match="x: got dtype float16, need bfloat16"):
        paddle_tape.begin_dispatch(x.astype("float16"), probs, opened())
    call = opened()
    rows, _ = paddle_tape.finish_dispatch(paddle_tape.begin_dispatch(x, probs, call), x, call)
    with pytest.raises(ValueError, match=r"y: got shape \[48, 128\], need \[24, 128\] .*each row that came"):
        paddle_tape.begin_combine(paddle.concat([rows, rows]), call)
    with pytest.raises(TypeError, match="y: got dtype int32, need"):
        paddle_tape.begin_combine(rows.astype("int32"), call)


def test_without_a_process_group_a_rank_is_alone():
    assert isinstance(paddle_communicator.of(), Alone)
