"""The shared linear algebra against normal equations, weighted least squares and its own dense form."""

import pytest
import torch

from sublimate.erasure import closed_form


def problem(edited=7, preserved=5, d_in=20, d_out=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 for n in (edited, preserved)]
    return (
        normal(edited, d_in),
        weights[0],
        normal(preserved, d_in),
        weights[1],
        normal(d_out, d_in),
        normal(edited, d_out),
    )


def weighted_least_squares(c_e, w_e, c_p, w_p, w0, v, lam):
    """Objective (1) as one stacked unweighted least-squares problem."""
    d_in = c_e.shape[1]
    rows = torch.cat([w_e.sqrt()[:, None] * c_e, w_p.sqrt()[:, None] * c_p, lam**0.5 * torch.eye(d_in).double()])
    values = torch.cat([w_e.sqrt()[:, None] * v, w_p.sqrt()[:, None] * (c_p @ w0.T), lam**0.5 * w0.T])
    return torch.linalg.lstsq(rows, values).solution.T


@pytest.mark.parametrize("edited, preserved", [(7, 5), (30, 11), (3, 0), (20, 0)])
def test_the_update_is_the_weighted_least_squares_solution(edited, preserved):
    c_e, w_e, c_p, w_p, w0, v = problem(edited, preserved)
    right = closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3)
    w = w0 + (v - c_e @ w0.T).T @ right
    torch.testing.assert_close(w, weighted_least_squares(c_e, w_e, c_p, w_p, w0, v, 0.3), rtol=0, atol=1e-11)


def test_the_normal_equations_hold():
    c_e, w_e, c_p, w_p, w0, v = problem()
    w = w0 + (v - c_e @ w0.T).T @ closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3)
    gradient = ((c_e @ w.T - v).T * w_e) @ c_e + ((c_p @ (w - w0).T).T * w_p) @ c_p + 0.3 * (w - w0)
    assert gradient.abs().max() < 1e-12


def test_accumulated_sums_give_the_same_solution():
    c_e, w_e, c_p, w_p, w0, v = problem(edited=30)
    cc = closed_form.second_moment(c_p, w_p, closed_form.second_moment(c_e, w_e))
    missing = v - c_e @ w0.T
    rc = closed_form.cross_moment(missing[:10], c_e[:10], w_e[:10])
    rc = closed_form.cross_moment(missing[10:], c_e[10:], w_e[10:], rc)
    w = w0 + closed_form.solve_ridge(cc, rc, 0.3)
    torch.testing.assert_close(w, weighted_least_squares(c_e, w_e, c_p, w_p, w0, v, 0.3), rtol=0, atol=1e-11)


def test_kernel_form_is_the_dense_form(monkeypatch):
    c_e, w_e, c_p, w_p, _, _ = problem()
    factored = []
    monkeypatch.setattr(
        closed_form, "_factored", lambda m, lam, f=closed_form._factored: factored.append(0) or f(m, lam)
    )
    kernel = closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3)
    assert not factored
    dense = closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3, moment=torch.zeros(20, 20))
    assert factored
    torch.testing.assert_close(kernel, dense, rtol=0, atol=1e-12)


def test_a_moment_stands_for_its_rows():
    c_e, w_e, c_p, w_p, _, _ = problem()
    moment = closed_form.second_moment(c_p, w_p)
    apart = closed_form.right_factor(c_e, w_e, c_p[:0], w_p[:0], lam=0.3, moment=moment)
    torch.testing.assert_close(apart, closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3), rtol=0, atol=1e-12)


def test_rows_of_weight_zero_do_nothing():
    c_e, w_e, c_p, w_p, _, _ = problem()
    w_e[2], w_p[1] = 0, 0
    right = closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3)
    assert (right[2] == 0).all()
    keep_e, keep_p = w_e > 0, w_p > 0
    fewer = closed_form.right_factor(c_e[keep_e], w_e[keep_e], c_p[keep_p], w_p[keep_p], lam=0.3)
    torch.testing.assert_close(right[keep_e], fewer, rtol=0, atol=1e-12)


def test_anchored_factors_are_the_update_of_every_layer():
    c_e, w_e, c_p, w_p, w0, _ = problem()
    anchors = torch.randn(c_e.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3)
    u, v = closed_form.anchored_factors(c_e, anchors, right)
    for layer in (w0, 3 * w0[:2]):
        expected = weighted_least_squares(c_e, w_e, c_p, w_p, layer, anchors @ layer.T, 0.3)
        torch.testing.assert_close(layer + layer @ u @ v, expected, rtol=0, atol=1e-11)


def test_rank_is_bounded_by_rows_and_falls_with_repeated_differences():
    c_e, w_e, c_p, w_p, _, _ = problem(edited=5)
    right = closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.3)
    anchors = torch.randn(c_e.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert closed_form.anchored_factors(c_e, anchors, right)[0].shape[1] == 5
    anchors[4] = c_e[4] + 2 * (anchors[3] - c_e[3])
    assert closed_form.anchored_factors(c_e, anchors, right)[0].shape[1] == 4
    assert closed_form.anchored_factors(c_e, c_e, right)[0].shape[1] == 0


def test_compress_keeps_the_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 9, generator=generator), torch.randn(9, 30, generator=generator)
    a, b = closed_form.compress(left, right)
    assert a.shape == (4, 4) and b.shape == (4, 30)
    torch.testing.assert_close(a @ b, left.double() @ right.double(), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_thousand_nearly_collinear_rows_are_solved_to_rounding():
    generator = torch.Generator().manual_seed(0)
    common = 25 * torch.nn.functional.normalize(torch.randn(1, 768, generator=generator), dim=1)
    rows = common + torch.randn(1000, 768, generator=generator) * 0.4
    anchors = common + torch.randn(1000, 768, generator=generator) * 0.4
    ones, none = torch.ones(1000), torch.zeros(0, 768)
    right = closed_form.right_factor(rows, ones, none, torch.zeros(0), lam=0.5)
    assert right.dtype == torch.float64
    # (2) says right A = L_E C_E.
    system = closed_form.second_moment(rows, ones) + 0.5 * torch.eye(768)
    assert (right @ system - rows.double()).abs().max() < 1e-9
    u, v = closed_form.anchored_factors(rows, anchors, right)
    torch.testing.assert_close(u @ v, (anchors.double() - rows.double()).T @ right, rtol=0, atol=1e-9)


def test_relative_lam_moves_rows_alike_at_any_scale():
    row, anchor = torch.randn(2, 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (0.01, 1.0, 30.0):
        c, g = scale * row, scale * anchor
        lam = closed_form.ridge(0.5, c, relative=True)
        right = closed_form.right_factor(c, torch.ones(1), c[:0], torch.zeros(0), lam)
        u, v = closed_form.anchored_factors(c, g, right)
        torch.testing.assert_close(c + c @ (u @ v).T, c + (g - c) / 1.5)
    assert closed_form.ridge(0.5, 30 * row, relative=False) == 0.5


def test_no_ridge_needs_rows_that_span_the_space():
    c_e, w_e, c_p, w_p, w0, v = problem(edited=30)
    w = w0 + (v - c_e @ w0.T).T @ closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.0)
    torch.testing.assert_close(w, weighted_least_squares(c_e, w_e, c_p, w_p, w0, v, 0.0), rtol=0, atol=1e-11)
    few = problem(edited=7)
    with pytest.raises(ValueError, match="not unique"):
        closed_form.right_factor(*few[:4], lam=0.0)
    for seed in range(8):  # rows in a hyperplane: rounding decides whether a bare Cholesky notices
        c_e, w_e, c_p, w_p, _, _ = problem(edited=30, seed=seed)
        c_e[:, 0], c_p[:, 0] = c_e[:, 1:].sum(1), c_p[:, 1:].sum(1)
        with pytest.raises(ValueError, match="not unique"):
            closed_form.right_factor(c_e, w_e, c_p, w_p, lam=0.0)


@pytest.mark.parametrize("lam, weight", [(-1.0, 1.0), (0.5, -1.0)])
def test_negative_weights_are_refused(lam, weight):
    c_e, w_e, c_p, w_p, _, _ = problem()
    with pytest.raises(ValueError, match="negative"):
        closed_form.right_factor(c_e, weight * w_e, c_p, w_p, lam)


@pytest.mark.parametrize("edited", (3, 40, closed_form._PART + 5))
def test_sums_over_rows_give_the_update_of_the_rows(edited):
    c_e, w_e, c_p, w_p, _, _ = problem(edited, 4, d_in=6)
    anchors = problem(edited, 4, d_in=6, seed=1)[0]
    u, v = closed_form.anchored_update(c_e, anchors, w_e, c_p, w_p, 0.3)
    right = closed_form.right_factor(c_e, w_e, c_p, w_p, 0.3)
    torch.testing.assert_close(u @ v, (anchors - c_e).T @ right, rtol=0, atol=1e-11)
    assert u.shape[1] == min(edited, 6)
    # What is sent to where it is already is left alone.
    assert closed_form.anchored_update(c_e, c_e, w_e, c_p[:0], w_p[:0], 0.3)[0].shape == (6, 0)
