import pytest
import torch
from networks import batch, convolutional, state
from oracles.naive_pgd import naive_l2_pgd, naive_linf_pgd
from torch import nn

from saltflat import AT, FGSM, L1, L2, PGD, TRADES, Linf, PerExample
from saltflat.inputs import gaussian, uniform, zero


@pytest.mark.parametrize("start", [zero, uniform, gaussian(1e-3)], ids=["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("objective", [AT(), TRADES()], ids=repr)
def test_linf_equals_the_naive_loop_to_the_bit(start, dtype, mode, objective):
    model = convolutional().to(dtype).train(mode == "train")
    x, y = batch()
    x = x.to(dtype)
    attack = PGD(Linf(8 / 255), 2 / 255, 10, start)
    delta = start(attack.ball, x, torch.Generator().manual_seed(1))
    f = objective.inner(model, x, y)
    expected = naive_linf_pgd(f, x, delta, eps=8 / 255, step_size=2 / 255, steps=10, box=(0.0, 1.0))
    assert torch.equal(attack(f, x, generator=torch.Generator().manual_seed(1)), expected)


def l2_loop(f, x, v, eps, step_size, steps):
    """The attack written out in one place; a gradient is divided by its largest entry before its norm is taken."""
    for _ in range(steps):
        leaf = (x + v).requires_grad_()
        (gradient,) = torch.autograd.grad(f(leaf).sum(), leaf)
        rows = gradient.flatten(1)
        rows = rows / rows.abs().amax(1, keepdim=True)
        ahead = (v.flatten(1) + rows / rows.norm(dim=1, keepdim=True) * step_size).clone()
        length = ahead.norm(dim=1, keepdim=True)
        v = torch.where(length > eps, ahead * (eps / length), ahead).view_as(x).clamp(0 - x, 1 - x)
    return x + v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_l2_equals_a_loop_in_the_same_arithmetic_to_the_bit(dtype, mode):
    model, (x, y) = convolutional().to(dtype).train(mode == "train"), batch()
    attack, x = PGD(L2(0.5), 0.1, 10), x.to(dtype)
    f = AT().inner(model, x, y)
    start = uniform(attack.ball, x, torch.Generator().manual_seed(1))
    found = attack(f, x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, l2_loop(f, x, start, 0.5, 0.1, 10))


@pytest.mark.parametrize("box", [(0.0, 1.0), None])
def test_l2_equals_the_naive_loop(box):
    model, (x, y) = convolutional().eval(), batch()
    attack = PGD(L2(0.5, box), 0.1, 10)
    delta = uniform(attack.ball, x, torch.Generator().manual_seed(1))
    f = AT().inner(model, x, y)
    expected = naive_l2_pgd(f, x, delta, eps=0.5, step_size=0.1, steps=10, box=box)
    assert torch.allclose(attack(f, x, generator=torch.Generator().manual_seed(1)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("ball", "dual"), [(Linf(0.1, None), 1), (L2(0.1, None), 2)])
@pytest.mark.parametrize("shape", [(7,), (7, 4), (7, 1, 2, 2)])
def test_reaches_the_optimum_of_a_linear_function(ball, dual, shape):
    """max <a, x'> over the ball is <a, x> + eps ‖a‖_dual."""
    x, a = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1:], dtype=torch.float64)

    def f(x_adv):
        return (x_adv * a).reshape(7, -1).sum(1)

    best = f(x) + 0.1 * a.reshape(-1).norm(p=dual)
    assert torch.allclose(f(PGD(ball, 0.05, 10, zero)(f, x)), best, atol=1e-12)


@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_attack_is_its_steps_one_after_the_other_to_the_bit(ball, dtype):
    model, (x, y) = convolutional().to(dtype).eval(), batch()
    attack, x = PGD(ball, 0.02, 5), x.to(dtype)
    f = AT().inner(model, x, y)
    v = uniform(ball, x, torch.Generator().manual_seed(1))
    for _ in range(5):
        leaf = (x + v).requires_grad_()
        v = attack.ahead(torch.autograd.grad(f(leaf).sum(), leaf)[0], v, x)
        assert not v.requires_grad
    assert torch.equal(attack(f, x, generator=torch.Generator().manual_seed(1)), x + v)


def test_fgsm_is_one_step_of_the_radius():
    model, (x, y) = convolutional().eval(), batch()
    f = AT().inner(model, x, y)
    leaf = x.clone().requires_grad_()
    expected = (x + 8 / 255 * torch.autograd.grad(f(leaf).sum(), leaf)[0].sign()).clamp(0, 1)
    assert torch.allclose(FGSM(Linf(8 / 255))(f, x), expected, atol=1e-15)


def test_leaves_no_weight_gradient_and_touches_neither_x_nor_an_eval_model():
    model, (x, y) = convolutional().eval(), batch()
    before, kept = state(model), x.clone()
    computed = []
    for parameter in model.parameters():
        parameter.register_hook(computed.append)
    x_adv = PGD(Linf(0.1), 0.05, 3)(AT().inner(model, x, y), x)
    assert not computed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x_adv.requires_grad
    assert not x.requires_grad
    assert torch.equal(x, kept)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_start_tensor_is_the_first_point_looked_at():
    seen = []

    def f(x_adv):
        seen.append(x_adv.detach().clone())
        return x_adv.flatten(1).sum(1)

    x = torch.rand(2, 3)
    start = (x + 0.05).clamp(0, 1)
    kept = start.clone()
    PGD(Linf(0.1), 0.05, 1)(f, x, start=start)
    assert torch.equal(seen[0], kept)
    assert torch.equal(start, kept)
    assert not start.requires_grad


def test_going_on_from_a_start_equals_going_on():
    model, (x, y) = convolutional().eval(), batch()
    f = AT().inner(model, x, y)
    half = PGD(Linf(8 / 255, None), 2 / 255, 5, zero)
    whole = PGD(Linf(8 / 255, None), 2 / 255, 10, zero)
    assert torch.allclose(half(f, x, start=half(f, x)), whole(f, x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("ball", [Linf(0.2), L2(1.0)])
def test_nan_gradients_leave_their_example_alone(ball):
    x = torch.rand(3, 4)

    def f(x_adv):
        poison = torch.tensor([1.0, torch.nan, 1.0])
        return x_adv.sum(1) * poison

    x_adv = PGD(ball, 0.1, 4, zero)(f, x)
    assert torch.equal(x_adv[1], x[1])
    assert (x_adv[0] != x[0]).any()


def test_draws_of_an_example_do_not_depend_on_its_batch():
    model, (x, y) = convolutional().eval(), batch()
    ids, attack = torch.arange(8), PGD(Linf(8 / 255), 2 / 255, 3)
    whole = attack(AT().inner(model, x, y), x, generator=PerExample(0, ids))
    part = attack(AT().inner(model, x[5:6], y[5:6]), x[5:6], generator=PerExample(0, ids[5:6]))
    assert torch.allclose(whole[5:6], part, atol=1e-12)


def test_a_batch_that_asks_for_gradients_gets_a_detached_answer():
    x = torch.rand(2, 3, requires_grad=True)
    assert not PGD(Linf(0.1), 0.05, 2)(lambda x_adv: x_adv.sum(1), x).requires_grad
    assert x.grad is None


def test_starts_are_what_they_say():
    x, ball = torch.full((2000, 3, 2, 2), 0.5), Linf(8 / 255)
    noise = gaussian(1e-3)(ball, x, torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(1e-3, rel=0.02)
    assert abs(noise.mean().item()) < 5e-5
    spread = uniform(ball, x, torch.Generator().manual_seed(0))
    assert spread.abs().max().item() == pytest.approx(8 / 255, rel=1e-3)
    assert spread.abs().mean().item() == pytest.approx(4 / 255, rel=0.02)
    assert not zero(ball, x).any()


def test_works_under_no_grad():
    model, (x, y) = convolutional().eval(), batch()
    with torch.no_grad():
        x_adv = FGSM(Linf(0.1))(AT().inner(model, x, y), x)
    assert (x_adv != x).any()


def test_refuses_what_cannot_be_run():
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        PGD(Linf(0.1), 0.1, 0)
    with pytest.raises(ValueError, match="step_size: expected"):
        PGD(Linf(0.1), -0.1, 1)


@pytest.mark.parametrize("build", [lambda: PGD(L1(12.0), 1.0, 10), lambda: FGSM(L1(12.0, box=None))])
def test_refuses_the_l1_ball(build):
    with pytest.raises(ValueError, match=r"^ball: .*one-pixel steps.*use saltflat\.evaluation\.SparseAPGD$"):
        build()


def test_refuses_inputs_outside_the_box_or_that_are_no_numbers():
    attack = PGD(Linf(0.1), 0.05, 1)
    with pytest.raises(ValueError, match=r"x: expected numbers in the ball's box \(0.0, 1.0\), got 0 to 255"):
        attack(lambda x: x.sum(1), torch.tensor([[0.0, 255.0]]))
    with pytest.raises(ValueError, match=r"x: expected floating point numbers, got torch\.uint8"):
        attack(lambda x: x.sum(1), torch.zeros(1, 2, dtype=torch.uint8))


def test_attacks_what_is_no_image_and_no_network():
    """Token embeddings, graph features: a function of a tensor is all that it takes."""
    embed = nn.Embedding(10, 6)
    x = embed(torch.tensor([[1, 2], [3, 4]])).detach()
    target = torch.randn_like(x)
    x_adv = PGD(L2(1.0, box=None), 0.25, 8)(lambda e: -(e - target).flatten(1).norm(dim=1), x)
    assert torch.allclose((x_adv - x).flatten(1).norm(dim=1), torch.ones(2), atol=1e-5)
