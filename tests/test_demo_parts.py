"""The parts of the demo, each against its definition: data, router, model, plain experts, optimizer, schedule.

Shapes as in ``examples/ernie_moe/model.py``.
"""

import math
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from ernie_moe.data import Corpus, read_text, standard_text
from ernie_moe.experts import PlainExperts, bf16_expert
from ernie_moe.model import Attention, ErnieMoELM, ModelConfig, RMSNorm, Router, rotary_tables, rotate
from ernie_moe.optimizer import MainGradAdamW
from ernie_moe.trainer import TrainConfig, Trainer

SMALL = {"hidden": 16, "intermediate": 8, "experts": 4, "heads": 2, "kind": "plain"}


@pytest.fixture(scope="module")
def corpus():
    return Corpus(standard_text(), seq=16, seed=3)


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_standard_text_repeats_no_paragraph():
    text = standard_text()
    paragraphs = text.split("\n\n")
    assert len(text) > 100_000
    assert len(set(paragraphs)) == len(paragraphs)


def test_held_out_text_is_not_learnt_from():
    letters = [chr(ord("a") + block) * 4096 for block in range(24)]
    corpus = Corpus("".join(letters), seq=8)
    assert set(corpus.held_out.tobytes().decode()) == {"l", "x"}
    assert not set(corpus.train) & set(corpus.held_out)


def test_batches_are_a_function_of_seed_step_and_micro_batch(corpus):
    batch = corpus.batch(5, 1, 4)
    assert batch.shape == (4, 17) and batch.dtype == np.int64
    assert (batch == Corpus(standard_text(), seq=16, seed=3).batch(5, 1, 4)).all()
    others = [corpus.batch(6, 1, 4), corpus.batch(5, 2, 4), Corpus(standard_text(), seq=16, seed=4).batch(5, 1, 4)]
    assert all((batch != other).any() for other in others)


def test_windows_are_runs_of_their_split(corpus):
    train, held_out = corpus.train.tobytes(), corpus.held_out.tobytes()
    assert all(bytes(window.astype(np.uint8)) in train for window in corpus.batch(0, 0, 8))
    held_out_batch = corpus.held_out_batch(8)
    assert all(bytes(window.astype(np.uint8)) in held_out for window in held_out_batch)
    assert (held_out_batch == corpus.held_out_batch(8)).all()


def test_shortest_split_that_works_gives_its_only_window():
    text = "x" * (11 * 4096) + "abcde"
    assert bytes(Corpus(text, seq=4).held_out_batch(1)[0].astype(np.uint8)) == b"abcde"
    with pytest.raises(ValueError, match="text: 45061 bytes leave a split of 5, need more than seq = 5"):
        Corpus(text, seq=5)


def test_unigram_entropy_of_a_known_distribution():
    # Four bytes, equally often in both splits: ln 4, but for the one count that each of 256 bytes is given.
    assert Corpus("abcd" * 1024 * 60, seq=8).unigram_entropy() == pytest.approx(math.log(4), abs=2e-3)


def test_text_from_a_file(tmp_path):
    path = tmp_path / "text"
    path.write_text("héllo", encoding="utf-8")
    assert read_text(path) == "héllo"


# ---- Model -----------------------------------------------------------------------------------------------------------


def test_router_against_numpy():
    paddle.seed(0)
    router = Router(hidden=16, experts=6, topk=3)
    x_TH = paddle.randn([40, 16])
    idx_TK, prob_TK, counts, balance_loss = router(x_TH)
    logits_TE = x_TH.numpy().astype(np.float64) @ router.gate.weight.numpy()
    softmax_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
    expected_TK = np.argsort(-softmax_TE, axis=-1)[:, :3]
    assert idx_TK.dtype == paddle.int32 and (idx_TK.numpy() == expected_TK).all()
    top_TK = np.take_along_axis(softmax_TE, expected_TK, -1)
    np.testing.assert_allclose(prob_TK.numpy(), top_TK / top_TK.sum(-1, keepdims=True), rtol=1e-5)
    assert isinstance(counts, list) and counts == np.bincount(expected_TK.ravel(), minlength=6).tolist()
    expected_balance = 6 * (np.array(counts) / 120 * softmax_TE.mean(0)).sum()
    assert float(balance_loss) == pytest.approx(expected_balance, rel=1e-5)


def test_balance_loss_is_e_when_one_expert_takes_all_and_one_when_even():
    router = Router(hidden=4, experts=4, topk=1)
    router.gate.weight.set_value(50.0 * paddle.eye(4))
    assert float(router(paddle.eye(4)[:1].tile([8, 1]))[3]) == pytest.approx(4.0)
    assert float(router(paddle.eye(4))[3]) == pytest.approx(1.0)


def test_balance_loss_moves_the_router_towards_balance():
    paddle.seed(1)
    router = Router(hidden=8, experts=4, topk=1)
    x_TH = paddle.randn([256, 8]) + 1.0
    before = max(router(x_TH)[2])
    for _ in range(100):
        router(x_TH)[3].backward()
        router.gate.weight.set_value(router.gate.weight - 0.3 * router.gate.weight.grad)
        router.gate.weight.clear_gradient()
    assert max(router(x_TH)[2]) < 0.8 * before


def test_probabilities_carry_a_gradient_to_the_router():
    paddle.seed(0)
    router = Router(hidden=8, experts=4, topk=2)
    router(paddle.randn([5, 8]))[1][:, 0].sum().backward()
    assert float(router.gate.weight.grad.abs().sum()) > 0


def test_rms_norm_against_numpy():
    norm = RMSNorm(8)
    norm.weight.set_value(paddle.arange(8, dtype="float32"))
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * np.arange(8)
    np.testing.assert_allclose(norm(paddle.to_tensor(x)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_tables(12, 8)
    q, k = paddle.randn([1, 1, 1, 8]), paddle.randn([1, 1, 1, 8])
    q_BNSD, k_BNSD = (rotate(x.tile([1, 1, 12, 1]), cos, sin) for x in (q, k))
    score_SS = paddle.matmul(q_BNSD, k_BNSD, transpose_y=True).numpy()[0, 0]
    for distance in range(-11, 12):
        diagonal = np.diagonal(score_SS, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.std(score_SS[0]) > 0.01
    assert np.allclose(np.linalg.norm(q_BNSD.numpy(), axis=-1), float(q.norm()), rtol=1e-5)


def test_attention_against_numpy():
    paddle.seed(0)
    config = ModelConfig(**SMALL)
    attention = Attention(config, gain=1.0)
    x_BSH = paddle.randn([2, 5, 16])
    qkv = (x_BSH.numpy() @ attention.qkv.weight.numpy()).reshape(2, 5, 3, 2, 8)
    cos, sin = rotary_tables(5, 8)
    q, k = (rotate(paddle.to_tensor(qkv[:, :, i].transpose(0, 2, 1, 3)), cos, sin).numpy() for i in (0, 1))
    expected = np.zeros((2, 5, 2, 8))
    for b, n, s in np.ndindex(2, 2, 5):
        score = q[b, n, s] @ k[b, n, : s + 1].T / math.sqrt(8)
        weight = np.exp(score - score.max())
        expected[b, s, n] = weight / weight.sum() @ qkv[b, : s + 1, 2, n]
    expected = expected.reshape(2, 5, 16) @ attention.out.weight.numpy()
    np.testing.assert_allclose(attention(x_BSH).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_model_does_not_see_the_future():
    paddle.seed(0)
    model = ErnieMoELM(ModelConfig(**SMALL))
    tokens_BS = np.random.default_rng(0).integers(0, 256, (1, 10))
    changed_BS = tokens_BS.copy()
    changed_BS[0, 6] ^= 1
    logits, other = (model(paddle.to_tensor(tokens))[0].numpy()[0] for tokens in (tokens_BS, changed_BS))
    np.testing.assert_allclose(logits[:6], other[:6], rtol=1e-5, atol=1e-6)
    assert np.abs(logits[6:] - other[6:]).max(axis=-1).min() > 1e-4


def test_model_reports_the_load_of_each_moe_layer():
    model = ErnieMoELM(ModelConfig(**SMALL, layers=4, topk=2))
    loss, balance_loss, load_LE = model.loss(np.zeros((3, 9), dtype=np.int64))
    assert load_LE.shape == (3, 4) and (load_LE.sum(-1) == 3 * 8 * 2).all()
    assert loss.dtype == paddle.float32 and 1.0 <= float(balance_loss) <= 4.0
    assert len(model.expert_runners()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 1}, "layers: got 1, need at least 2"),
        ({"topk": 5}, "topk: got 5, need 1 to 4"),
        ({"hidden": 18}, "hidden: got 18, need a multiple of 4"),
    ],
)
def test_sizes_that_cannot_work_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(SMALL | change))


def test_plain_experts_refuse_fp8():
    with pytest.raises(ValueError, match="precision: got 'fp8', plain experts run 'bf16' only"):
        ErnieMoELM(ModelConfig(**SMALL, precision="fp8"))


# ---- Plain experts ---------------------------------------------------------------------------------------------------


def make_experts(count, hidden=16, intermediate=8):
    paddle.seed(7)
    return [bf16_expert(hidden, intermediate) for _ in range(count)]


def parameters_of(experts):
    return [weight for expert in experts for weight in (expert.up_gate_proj.weight, expert.down_proj.weight)]


def reference(experts, x, idx, prob, dout):
    """The contract's formulas in float64: out, dx, ds and the gradients of all weights."""
    out, dx, ds, dws = np.zeros_like(x), np.zeros_like(x), np.zeros(idx.shape), []
    for e, expert in enumerate(experts):
        w1, w2 = (w.astype("float32").numpy().astype(np.float64) for w in parameters_of([expert]))
        dw1, dw2 = np.zeros_like(w1), np.zeros_like(w2)
        for t, k in np.argwhere(idx == e):
            gate, up = np.split(x[t] @ w1, 2)
            sigmoid = 1 / (1 + np.exp(-gate))
            a = gate * sigmoid * up
            da = dout[t] @ w2.T
            ds[t, k] = da @ a
            out[t] += prob[t, k] * (a @ w2)
            da = prob[t, k] * da
            dz = np.concatenate([da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid])
            dw1 += np.outer(x[t], dz)
            dw2 += np.outer(prob[t, k] * a, dout[t])
            dx[t] += dz @ w1.T
        dws += [dw1, dw2]
    return out, dx, ds, dws


def run_plain(run, x, idx, prob, dout):
    x = paddle.to_tensor(x).astype("bfloat16")
    prob = paddle.to_tensor(prob.astype(np.float32))
    x.stop_gradient = prob.stop_gradient = False
    idx = paddle.to_tensor(idx.astype(np.int32))
    out = run(x, None, idx, prob)
    out.backward(paddle.to_tensor(dout).astype("bfloat16"))
    return (t.astype("float32").numpy() for t in (out, x.grad, prob.grad))


def problem(seed, tokens=12, experts=3, topk=2, hidden=16):
    rng = np.random.default_rng(seed)

    def bf16_values(*shape):
        value = paddle.to_tensor(rng.normal(size=shape).astype(np.float32)).astype("bfloat16")
        return value.astype("float32").numpy().astype(np.float64)

    idx = np.stack([rng.permutation(experts)[:topk] for _ in range(tokens)])
    idx[rng.random(idx.shape) < 0.2] = -1
    prob = rng.random(idx.shape).astype(np.float32).astype(np.float64)
    return bf16_values(tokens, hidden), idx, prob, bf16_values(tokens, hidden)


def assert_close(value, expected, floor):
    assert np.linalg.norm(value - expected) <= floor * np.linalg.norm(expected)


def test_plain_experts_against_float64_over_two_micro_batches():
    experts = make_experts(3)
    run = PlainExperts(experts)
    sums = [0.0] * 6
    for seed in (0, 1):
        case = problem(seed)
        out, dx, ds, dws = reference(experts, *case)
        for value, expected, floor in zip(run_plain(run, *case), (out, dx, ds), (4e-3, 4e-3, 1e-5), strict=True):
            assert_close(value, expected, floor)
        sums = [total + dw for total, dw in zip(sums, dws, strict=True)]
    assert all(getattr(weight, "main_grad", None) is None for weight in parameters_of(experts))
    run.step()
    for weight, expected in zip(parameters_of(experts), sums, strict=True):
        assert weight.grad is None and weight.main_grad.dtype == paddle.float32
        assert_close(weight.main_grad.numpy(), expected, 1e-5)


def test_plain_experts_add_to_what_main_grad_holds():
    experts = make_experts(3)
    run = PlainExperts(experts)
    run_plain(run, *problem(0))
    run.step()
    once = [weight.main_grad.numpy().copy() for weight in parameters_of(experts)]
    run.step()  # nothing is pending: nothing changes
    run_plain(run, *problem(0))
    run.step()
    for weight, grad in zip(parameters_of(experts), once, strict=True):
        np.testing.assert_array_equal(weight.main_grad.numpy(), 2 * grad)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    # Not None: AdamW skips a parameter without gradient, and then its momentum and decay would stand still.
    experts = make_experts(3)
    run = PlainExperts(experts)
    run_plain(run, *problem(0, experts=2))
    run.step()
    assert all(not weight.main_grad.numpy().any() for weight in parameters_of(experts[2:]))
    assert all(weight.main_grad.numpy().any() for weight in parameters_of(experts[:2]))


def test_plain_experts_without_any_slot_give_zeros():
    x, idx, prob, _ = problem(0)
    x, prob = paddle.to_tensor(x.astype(np.float32)).astype("bfloat16"), paddle.to_tensor(prob.astype(np.float32))
    out = PlainExperts(make_experts(3))(x, [0, 0, 0], paddle.full(idx.shape, -1, dtype="int32"), prob)
    assert out.shape == x.shape and not out.astype("float32").numpy().any()


def test_evaluation_leaves_nothing_pending():
    experts = make_experts(3)
    run = PlainExperts(experts)
    x, idx, prob, _ = problem(0)
    with paddle.no_grad():
        run(
            paddle.to_tensor(x).astype("bfloat16"),
            None,
            paddle.to_tensor(idx),
            paddle.to_tensor(prob).astype("float32"),
        )
    run.step()
    assert all(getattr(weight, "main_grad", None) is None for weight in parameters_of(experts))


# ---- Optimizer -------------------------------------------------------------------------------------------------------


def named_parameters():
    """A bf16 matrix and an fp32 vector, as (name, parameter)."""
    matrix = paddle.create_parameter([3, 4], "float32", default_initializer=paddle.nn.initializer.Normal())
    vector = paddle.create_parameter([4], "float32", default_initializer=paddle.nn.initializer.Normal())
    layer = paddle.nn.Layer()
    layer.add_parameter("matrix", matrix)
    layer.to(dtype="bfloat16")
    return [("matrix", layer.matrix), ("vector", vector)]


def give_gradients(parameters, seed):
    rng = np.random.default_rng(seed)
    grads = [rng.normal(size=p.shape).astype(np.float32) for _, p in parameters]
    parameters[0][1].main_grad = paddle.to_tensor(grads[0])
    parameters[1][1].grad = paddle.to_tensor(grads[1])
    return grads


def values_of(parameters):
    return [p.astype("float32").numpy() for _, p in parameters]


def test_adamw_against_numpy():
    paddle.seed(0)
    parameters = named_parameters()
    optimizer = MainGradAdamW(parameters, learning_rate=0.05, weight_decay=0.1, clip_norm=1.0)
    masters = [value.astype(np.float64) for value in values_of(parameters)]
    first, second = [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 6):
        grads = give_gradients(parameters, step)
        optimizer.step()
        optimizer.clear_grad()
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
        for i, decay in enumerate((0.1, 0.0)):  # a vector is a norm's gain or a bias: no decay
            g = grads[i] * min(1.0, 1.0 / norm)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            update = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.95**step)) + 1e-8)
            masters[i] = masters[i] * (1 - 0.05 * decay) - 0.05 * update
        for name, expected in zip(("matrix", "vector"), masters, strict=True):
            np.testing.assert_allclose(optimizer.masters[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    rounded = optimizer.masters["matrix"].astype("bfloat16").astype("float32").numpy()
    np.testing.assert_array_equal(values_of(parameters)[0], rounded)


def test_updates_too_small_for_bf16_add_up_in_the_master():
    parameters = named_parameters()[:1]
    matrix = parameters[0][1]
    matrix.set_value(paddle.ones([3, 4], dtype="bfloat16"))
    optimizer = MainGradAdamW(parameters, learning_rate=1e-4, weight_decay=0.0)
    for _ in range(100):  # each step moves by 1e-4; the bf16 neighbour of 1 is 4e-3 away
        matrix.main_grad = paddle.ones([3, 4])
        optimizer.step()
    np.testing.assert_allclose(matrix.astype("float32").numpy(), 0.99, atol=2e-3)


def test_main_grad_goes_before_grad_and_both_are_cleared():
    paddle.seed(0)
    parameters = named_parameters()
    vector = parameters[1][1]
    before = vector.numpy().copy()
    vector.grad = paddle.ones([4])
    vector.main_grad = -paddle.ones([4])
    optimizer = MainGradAdamW(parameters, learning_rate=0.1, weight_decay=0.0)
    matrix_before = values_of(parameters)[0]
    optimizer.step()
    assert (vector.numpy() > before).all()
    np.testing.assert_array_equal(values_of(parameters)[0], matrix_before)  # no gradient, no update
    optimizer.clear_grad()
    assert vector.main_grad is None and vector.grad is None
    after = vector.numpy().copy()
    optimizer.step()
    np.testing.assert_array_equal(vector.numpy(), after)


def test_optimizer_state_round_trips_bit_for_bit(tmp_path):
    paddle.seed(0)
    parameters = named_parameters()
    optimizer = MainGradAdamW(parameters, learning_rate=0.05)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
        optimizer.clear_grad()
    saved = {"optimizer": optimizer.state_dict(), "model": {name: p.clone().detach() for name, p in parameters}}
    paddle.save(saved, str(tmp_path / "state"))

    resumed = named_parameters()
    other = MainGradAdamW(resumed, learning_rate=0.05)
    state = paddle.load(str(tmp_path / "state"))
    for name, p in resumed:
        p.set_value(state["model"][name])
    other.set_state_dict(state["optimizer"])
    for step in range(3, 6):
        for these, its in ((parameters, optimizer), (resumed, other)):
            give_gradients(these, step)
            its.step()
            its.clear_grad()
        for one, two in zip(values_of(parameters), values_of(resumed), strict=True):
            np.testing.assert_array_equal(one, two)
    for name in ("matrix", "vector"):
        np.testing.assert_array_equal(optimizer.masters[name].numpy(), other.masters[name].numpy())


def test_state_dict_is_a_copy():
    parameters = named_parameters()
    optimizer = MainGradAdamW(parameters, learning_rate=0.05)
    give_gradients(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()
    before = {name: tensor.numpy().copy() for name, tensor in state.items()}
    give_gradients(parameters, 1)
    optimizer.step()
    assert all((state[name].numpy() == value).all() for name, value in before.items())


def test_state_of_another_model_is_refused():
    optimizer = MainGradAdamW(named_parameters())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"it has \['stranger.master'\]"):
        optimizer.set_state_dict(state | {"stranger.master": paddle.zeros([1])})
    with pytest.raises(ValueError, match=r"it lacks \['matrix.master'\]"):
        optimizer.set_state_dict({})


def test_frozen_parameters_are_left_alone():
    parameters = named_parameters()
    parameters[1][1].stop_gradient = True
    assert list(MainGradAdamW(parameters).parameters) == ["matrix"]


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=10)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_batch_must_split_evenly():
    with pytest.raises(ValueError, match="batch: got 6, need a multiple of micro_batches = 4"):
        TrainConfig(batch=6, micro_batches=4)


def test_evaluation_changes_nothing_but_the_history(corpus):
    config = TrainConfig(steps=4, batch=4, micro_batches=2, eval_batch=5)
    trainers = [Trainer(ModelConfig(**SMALL), config, corpus) for _ in range(2)]
    losses = [[], []]
    for _ in range(3):
        for trainer, seen in zip(trainers, losses, strict=True):
            seen.append(trainer.step())
        assert trainers[1].evaluate() == trainers[1].evaluate()
    assert losses[0] == losses[1]
    assert [step for step, _ in trainers[1].held_out] == [1, 1, 2, 2, 3, 3]
    assert trainers[0].loads[0].sum() == 2 * 4 * 16 * 2  # layers, sequences, bytes, slots


def test_final_train_loss_is_the_mean_of_the_last_tenth(corpus):
    trainer = Trainer(ModelConfig(**SMALL), TrainConfig(), corpus)
    trainer.losses = [9.0] * 18 + [1.0, 3.0]
    assert trainer.final_train_loss() == 2.0
