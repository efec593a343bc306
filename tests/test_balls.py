"""One contract for every ball. Each case says how its rows are cut: what has a radius of its own, and which norm it is
measured in.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from saltflat.balls import L1, L2, Box, Ellipsoid, Filterwise, Global, Layerwise, Linf, bits, norms
from saltflat.random import PerExample

TOGETHER = (Global, Ellipsoid, Box)  # whose tensors share one radius
SHAPES = {"w1": (3, 4), "w2": (2, 3, 2, 2), "b": (5,)}


@dataclass
class Case:
    name: str
    ball: Any
    centre: Any
    cut: Any  # member -> list of (row, radius): an independent statement of the ball's geometry
    order: float  # of the norm
    dual_cut: Any = None  # the same of a gradient, where that is cut otherwise than a member

    def like(self, scale=1.0):
        if isinstance(self.centre, dict):
            return {name: scale * torch.randn_like(w) for name, w in self.centre.items()}
        return scale * torch.randn_like(self.centre)


def items(member):
    return member if isinstance(member, dict) else {"x": member}


def by_example(radius):
    return lambda member, centre: [(row.flatten(), radius) for row in member]


def by_tensor(radius):
    return lambda member, centre: [(v.flatten(), radius * centre[name].norm().item()) for name, v in member.items()]


def by_filter(radius):
    return lambda member, centre: [
        (row.flatten(), radius * w.norm().item())
        for name, v in member.items()
        for row, w in zip(v, centre[name], strict=True)
    ]


def all_together(radius, relative):
    def cut(member, centre):
        norm = math.sqrt(sum(w.norm().item() ** 2 for w in centre.values()))
        return [(torch.cat([v.flatten() for v in member.values()]), radius * norm if relative else radius)]

    return cut


def stretched(radius, offset, power):
    """One row over all tensors, in units of |w| + offset: members are divided by it, gradients multiplied."""

    def cut(member, centre):
        return [(torch.cat([(v * (centre[n].abs() + offset) ** power).flatten() for n, v in member.items()]), radius)]

    return cut


def cases(dtype):
    torch.manual_seed(1)
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    found = []
    for shape in ((5,), (5, 4), (5, 3, 2, 2)):
        x = torch.rand(shape, dtype=dtype)
        for radius in (0.3, 8 / 255):
            found.append(Case(f"Linf{shape}", Linf(radius, box=None), x, by_example(radius), math.inf))
            found.append(Case(f"L2{shape}", L2(radius, box=None), x, by_example(radius), 2))
            found.append(Case(f"L1{shape}", L1(radius, box=None), x, by_example(radius), 1))
    for radius in (0.01, 2.0):
        found.append(Case("Layerwise", Layerwise(radius), weights, by_tensor(radius), 2))
        found.append(Case("Filterwise", Filterwise(radius), weights, by_filter(radius), 2))
        found.append(Case("Global", Global(radius), weights, all_together(radius, False), 2))
        found.append(Case("Global relative", Global(radius, relative=True), weights, all_together(radius, True), 2))
        for offset in (0.0, 1.0):
            cuts = stretched(radius, offset, -1), stretched(radius, offset, 1)
            found.append(Case(f"Ellipsoid {offset}", Ellipsoid(radius, offset), weights, cuts[0], 2, cuts[1]))
            found.append(Case(f"Box {offset}", Box(radius, offset), weights, cuts[0], math.inf, cuts[1]))
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        both = [(case, dtype) for dtype in (torch.float64, torch.float32) for case in cases(dtype)]
        ids = [f"{case.name}-{case.ball.radius:.3g}-{str(dtype)[6:]}" for case, dtype in both]
        metafunc.parametrize(
            ("case", "tolerance"), [(c, 1e-12 if d is torch.float64 else 1e-6) for c, d in both], ids=ids
        )


def inner_product(one, other):
    return sum(
        (a.double() * b.double()).sum().item() for a, b in zip(items(one).values(), items(other).values(), strict=True)
    )


def close(one, other, tolerance):
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(items(one).values(), items(other).values(), strict=True)
    )


def identical(one, other):
    return all(torch.equal(a, b) for a, b in zip(items(one).values(), items(other).values(), strict=True))


def scaled(member, factor):
    return {name: factor * v for name, v in member.items()} if isinstance(member, dict) else factor * member


def is_member(case, v, tolerance):
    return all(
        row.double().norm(p=case.order).item() <= radius * (1 + tolerance) for row, radius in case.cut(v, case.centre)
    )


def test_steepest_attains_hoelder_equality(case, tolerance):
    g = case.like()
    dual = {math.inf: 1, 2: 2, 1: math.inf}[case.order]
    rows = (case.dual_cut or case.cut)(g, case.centre)
    best = sum(radius * row.double().norm(p=dual).item() for row, radius in rows)
    v = case.ball.steepest(g, case.centre)
    assert inner_product(g, v) == pytest.approx(best, rel=10 * tolerance)
    assert is_member(case, v, tolerance)
    assert inner_product(g, case.ball.sample(case.centre, torch.Generator().manual_seed(0))) <= best


@pytest.mark.parametrize("c", [1e-20, 3.0, 1e20])
def test_steepest_ignores_the_gradient_s_scale(case, tolerance, c):
    g = case.like()
    assert close(case.ball.steepest(scaled(g, c), case.centre), case.ball.steepest(g, case.centre), 20 * tolerance)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_zero_or_non_finite_gradient_gives_no_step(case, tolerance, bad):
    g = case.like()
    first = next(iter(items(g).values()))
    if bad == 0:
        first[0] = 0.0 if case.ball.__class__ in (Linf, L2, L1, Filterwise) else first[0]
    whole = first[0] if first.ndim > 1 else first
    if bad == 0 and case.ball.__class__ in (Layerwise, *TOGETHER):
        first.zero_()
        if isinstance(case.ball, TOGETHER):
            for tensor in g.values():
                tensor.zero_()
    elif bad != 0:
        whole.view(-1)[0] = bad
    clean = case.ball.steepest(case.like(), case.centre)
    v = case.ball.steepest(g, case.centre)
    assert all(tensor.isfinite().all() for tensor in items(v).values())
    stopped = {Layerwise: "tensor"} | dict.fromkeys(TOGETHER, "all")
    stopped = stopped.get(case.ball.__class__, "example")
    one = next(iter(items(v).values()))
    if stopped == "all":
        assert all((tensor == 0).all() for tensor in v.values())
    elif stopped == "tensor":
        assert (one == 0).all()
        assert all((v[name] != 0).any() for name in list(v)[1:])
    else:
        assert (one[0] == 0).all()
        assert (one[1:] != 0).any()
    assert any((tensor != 0).any() for tensor in items(clean).values())


def test_projection_inside_on_and_outside(case, tolerance):
    direction = case.ball.steepest(case.like(), case.centre)  # on the surface
    inside = scaled(direction, 0.9)
    assert identical(case.ball.project(inside, case.centre), inside)
    assert close(case.ball.project(direction, case.centre), direction, tolerance)
    outside = scaled(direction, 7.0)
    projected = case.ball.project(outside, case.centre)
    assert is_member(case, projected, tolerance)
    assert close(projected, direction, 2 * tolerance)
    assert close(case.ball.project(projected, case.centre), projected, tolerance)


def test_projection_is_the_nearest_member(case, tolerance):
    """In the Euclidean norm, or in that of v / (|w| + offset) if the ball is stretched."""
    v = case.like(3.0)
    projected = case.ball.project(v, case.centre)

    def distance(member):
        apart = {name: a - v[name] for name, a in member.items()} if isinstance(member, dict) else member - v
        return math.sqrt(sum(row.double().square().sum().item() for row, _ in case.cut(apart, case.centre)))

    generator = torch.Generator().manual_seed(0)
    for surface in (False, True):
        for _ in range(20):
            assert distance(projected) <= distance(case.ball.sample(case.centre, generator, surface)) * (1 + tolerance)


def test_samples_are_members_and_surface_samples_lie_on_the_surface(case, tolerance):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert is_member(case, case.ball.sample(case.centre, generator), tolerance)
        for row, radius in case.cut(case.ball.sample(case.centre, generator, surface=True), case.centre):
            assert row.double().norm(p=case.order).item() == pytest.approx(radius, rel=2 * tolerance)


def test_samples_fill_the_ball_uniformly(case, tolerance):
    generator = torch.Generator().manual_seed(0)
    fractions = []
    for _ in range(400):
        for row, radius in case.cut(case.ball.sample(case.centre, generator), case.centre):
            fractions.append((row.double().norm(p=case.order).item() / radius) ** row.numel())
    # ‖v‖ / radius to the power of the dimension is uniform in [0, 1]: compare its mean within 5 standard errors
    assert abs(sum(fractions) / len(fractions) - 0.5) < 5 / math.sqrt(12 * len(fractions))


def test_equal_generators_give_equal_samples_and_inputs_are_not_written_to(case, tolerance):
    before, g = scaled(case.centre, 1), case.like()
    kept = scaled(g, 1)
    one, other = (case.ball.sample(case.centre, torch.Generator().manual_seed(3)) for _ in range(2))
    assert identical(one, other)
    case.ball.steepest(g, case.centre)
    case.ball.project(g, case.centre)
    assert identical(case.centre, before)
    assert identical(g, kept)


def test_radius_zero_is_a_point(case, tolerance):
    point = replace(case.ball, radius=0.0)
    for v in (
        point.steepest(case.like(), case.centre),
        point.project(case.like(), case.centre),
        point.sample(case.centre),
    ):
        assert all((tensor == 0).all() for tensor in items(v).values())


@pytest.mark.parametrize("ball", [Linf, L2, L1, Layerwise, Filterwise, Global, Ellipsoid, Box])
@pytest.mark.parametrize("radius", [-1e-9, math.nan, math.inf])
def test_refuses_a_radius_that_is_none(ball, radius):
    with pytest.raises(ValueError, match="radius: expected a finite number >= 0"):
        ball(radius)


@pytest.mark.parametrize("ball", [Ellipsoid, Box])
@pytest.mark.parametrize("offset", [-1e-9, math.nan, math.inf])
def test_refuses_an_offset_that_is_none(ball, offset):
    with pytest.raises(ValueError, match="offset: expected a finite number >= 0"):
        ball(0.1, offset)


@pytest.mark.parametrize("ball", [Ellipsoid(0.5), Box(0.5)])
def test_a_weight_that_is_zero_stays_zero_without_an_offset(ball):
    """And the others fill the ball that is left: of 2 dimensions, not of 4."""
    w = {"a": torch.tensor([0.0, 2.0, 0.0]).double(), "b": torch.tensor([-1.0]).double()}
    order = 2 if isinstance(ball, Ellipsoid) else math.inf
    alive = lambda v: torch.stack([v["a"][1] / 2, v["b"][0]]).norm(p=order).item() / 0.5
    generator, fractions = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        inside, on = ball.sample(w, generator), ball.sample(w, generator, surface=True)
        assert inside["a"][[0, 2]].tolist() == on["a"][[0, 2]].tolist() == [0, 0]
        assert alive(on) == pytest.approx(1)
        fractions.append(alive(inside) ** 2)
    assert abs(sum(fractions) / 1000 - 0.5) < 5 / math.sqrt(12 * 1000)
    far = {"a": torch.tensor([7.0, 0.125, -7.0]).double(), "b": torch.tensor([0.25]).double()}
    assert ball.project(far, w)["a"].tolist() == [0, 0.125, 0]
    assert ball.project(far, w)["b"].tolist() == [0.25]
    assert ball.steepest(far, w)["a"][[0, 2]].tolist() == [0, 0]
    nothing = {"a": torch.zeros(3), "b": torch.zeros(1)}
    for v in (ball.sample(nothing, generator), ball.steepest(far, nothing), ball.project(far, nothing)):
        assert not torch.cat(list(v.values())).any()


@pytest.mark.parametrize(("ball", "order"), [(Linf(0.3), math.inf), (L2(0.7), 2), (L1(0.7), 1)])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 3, 2, 2)])
def test_the_box_holds_for_projections_and_samples(ball, order, shape):
    x = torch.rand(shape)
    x[0], x[1] = 0.0, 1.0
    generator = torch.Generator().manual_seed(0)
    for v in (ball.project(torch.randn(shape), x), ball.sample(x, generator), ball.sample(x, generator, surface=True)):
        assert (x + v).min() >= 0
        assert (x + v).max() <= 1
        assert is_member(Case("", ball, x, by_example(ball.radius), order), v, 1e-6)


@pytest.mark.parametrize("ball", [Linf(0.3), L2(0.7), L1(0.7), L1(0.3, None), L2(0.3, None), Linf(0.3, None)])
def test_projections_of_anything_are_idempotent(ball):
    x = torch.rand(50, 3, 2, 2, dtype=torch.float64)
    once = ball.project(torch.randn_like(x), x)
    assert torch.allclose(ball.project(once, x), once, rtol=1e-12, atol=1e-12)


def test_linf_projection_with_a_box_is_the_nearest_point_of_the_intersection():
    ball, x = Linf(0.3), torch.tensor([[0.1, 0.5, 0.95]], dtype=torch.float64)
    assert torch.allclose(
        ball.project(torch.tensor([[-1.0, 1.0, 1.0]], dtype=torch.float64), x),
        torch.tensor([[-0.1, 0.3, 0.05]]).double(),
    )


def test_input_balls_draw_per_example():
    ids = torch.arange(4)
    x = torch.rand(4, 3, 2, 2)
    for ball in (Linf(0.3), L2(0.3), L1(0.3)):
        whole = ball.sample(x, PerExample(0, ids))
        assert torch.equal(whole[2:3], ball.sample(x[2:3], PerExample(0, ids[2:3])))


def test_refuses_a_box_that_is_none():
    with pytest.raises(ValueError, match="low < high"):
        Linf(0.1, box=(1.0, 0.0))
    with pytest.raises(ValueError, match="low < high"):
        L1(0.1, box=(1.0, 0.0))


def test_empty_batches_pass_through():
    x = torch.zeros(0, 3, 2, 2)
    for ball in (Linf(0.1), L2(0.1), L1(0.1)):
        assert ball.steepest(x, x).shape == ball.project(x, x).shape == x.shape


KINDS = {  # of tensors that stand side by side in one network
    "double": torch.randn(3, 4).double(),
    "single": torch.randn(4, 3, 2, 2),
    "channels-last": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "every other": torch.randn(6, 8)[::2, ::2],
    "bfloat16": torch.randn(5, 2).bfloat16(),
    "half": torch.randn(5, 2).half(),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "complex double": torch.randn(3, 2, dtype=torch.complex128),
    "number": torch.tensor(-3.0),
    "empty": torch.zeros(0, 3),
    "nan": torch.randn(4, 2),
    "infinite": torch.randn(4, 2),
    "zero": torch.randn(4, 2),
    "tiny": torch.randn(4, 2),
    "huge": torch.randn(4, 2),
}


def gradients():
    torch.manual_seed(2)
    found = {name: torch.randn_like(w) for name, w in KINDS.items()}
    found["nan"][1, 1], found["infinite"][2, 0] = torch.nan, -torch.inf
    return found | {"zero": found["zero"] * 0, "tiny": found["tiny"] * 1e-37, "huge": found["huge"] * 1e37}


def test_layers_of_every_kind_take_the_step_that_they_take_alone():
    g, ball = gradients(), Layerwise(0.5)
    v = ball.steepest(g, KINDS)
    assert list(v) == list(KINDS)
    for name, w in KINDS.items():
        assert v[name].shape == w.shape
        assert v[name].dtype == w.dtype
        if name in ("nan", "infinite", "zero", "empty"):
            assert not v[name].any()
            continue
        exact = torch.complex128 if w.is_complex() else torch.float64
        wide, direction = w.to(exact), g[name].to(exact)
        epsilon = torch.finfo(w.dtype).eps
        expected = 0.5 * wide.norm() * direction / direction.norm()
        torch.testing.assert_close(v[name].to(exact), expected, rtol=8 * epsilon, atol=epsilon / 8)
        alone = ball.steepest({name: g[name]}, KINDS)[name]
        torch.testing.assert_close(v[name], alone, rtol=4 * epsilon, atol=epsilon / 8)
    once = ball.project({name: 3 * s for name, s in v.items()}, KINDS)
    for name, w in KINDS.items():
        assert once[name].dtype == w.dtype
        torch.testing.assert_close(once[name], v[name], rtol=8 * torch.finfo(w.dtype).eps, atol=0)


def test_layers_on_several_devices_take_the_step_that_they_take_alone():
    w = {"a": torch.randn(3, 4), "b": torch.empty(2, 2, device="meta"), "c": torch.randn(5, 2)}
    g, ball = {name: torch.randn_like(tensor) for name, tensor in w.items()}, Layerwise(0.5)
    alone = {name: ball.steepest({name: g[name]}, w)[name] for name in "ac"}
    for found, times in (
        (ball.steepest(g, w), 1),
        (ball.project({name: 2 * tensor for name, tensor in ball.steepest(g, w).items()}, w), 1),
        (ball.project({name: tensor / 2 for name, tensor in ball.steepest(g, w).items()}, w), 0.5),
    ):
        assert list(found) == list("abc")
        assert found["b"].is_meta
        assert all(torch.allclose(found[name], times * alone[name]) for name in "ac")
    assert ball.sample(w, surface=True)["b"].is_meta
    assert ball.sample(w, surface=True)["c"].norm().item() == pytest.approx(0.5 * w["c"].norm().item())


def test_no_layers_take_no_step():
    ball = Layerwise(0.5)
    assert ball.steepest({}, {}) == ball.steepest({}, KINDS) == ball.project({}, KINDS) == ball.sample({}) == {}


def test_layers_keep_their_memory_layout_and_a_step_does_not_depend_on_it():
    torch.manual_seed(0)
    w, g = torch.randn(8, 4, 3, 3).double(), torch.randn(8, 4, 3, 3).double()
    plain = Layerwise(0.5).steepest({"w": g}, {"w": w})["w"]
    last = {"memory_format": torch.channels_last}
    v = Layerwise(0.5).steepest({"w": g.contiguous(**last)}, {"w": w.contiguous(**last)})["w"]
    assert v.is_contiguous(**last)
    torch.testing.assert_close(v, plain, rtol=1e-14, atol=0)


def test_the_norms_of_many_tensors_are_those_of_each():
    tensors = [torch.randn(3, 4), torch.randn(()), torch.zeros(0, 2), torch.randn(2, 3, 2, 2), torch.tensor([1e30, 0])]
    for order in (1, 2, math.inf):
        expected = [x.flatten().double().norm(p=order) if x.numel() > 0 else torch.zeros(()).double() for x in tensors]
        if order == 2:  # whose squares are beyond fp32
            expected[-1] = torch.tensor(math.inf).double()
        torch.testing.assert_close(norms(tensors, order).double(), torch.stack(expected), rtol=1e-6, atol=0)
    assert norms([torch.tensor([1.0, torch.nan])], math.inf).isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half, torch.complex64,
                                   torch.complex128, torch.int64, torch.bool])  # fmt: skip
def test_numbers_times_0_are_0_as_bits_and_times_1_themselves(dtype):
    x = torch.tensor([-0.0, 3.0, -7.0, 0.0] if dtype.is_floating_point or dtype.is_complex else [0, 1, 1, 0]).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        x = torch.cat([x, torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)])
    for tensor in (x.clone(), x.clone()[::2], x[0].clone()):
        numbers, kept = bits([tensor])[0], tensor.clone()
        numbers.mul_(torch.tensor(1))
        assert torch.equal(bits([tensor])[0], bits([kept])[0])
        numbers.mul_(torch.tensor(0))
        assert not tensor.any()
