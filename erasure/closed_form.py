"""The linear algebra closed-form erasers share: weighted ridge regression on embedding rows, in float64 on the CPU.

Embedding rows are (rows, d_in), one embedding vector c per row; a linear layer maps them as `rows @ W.T`. Every closed
form minimises, over W,

    sum_i w_i |W c_i - v_i|^2 + sum_j w_j |W c_j - W0 c_j|^2 + lam |W - W0|_F^2                                    (1)

with edited rows i and preserved rows j, whose solution is

    W - W0 = R L_E C_E A^-1,   A = C^T L C + lam I,   R = V - W0 C_E^T                                             (2)

The factor L_E C_E A^-1 does not know the layer: it is computed once for all layers fed by the same embedding.
float32 is not enough: rows of one text encoder are nearly collinear, and A's condition number reaches 1e6.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values below this fraction of the largest are rounding errors of the float64 solve.
RANK_TOLERANCE = 1e-12

# Rows converted to float64 at once.
_PART = 8192


def second_moment(rows: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_i w_i c_i c_i^T, (d_in, d_in) float64, added to `total` when given (for rows that arrive in parts)."""
    rows, weights = _float64(rows), _weights(weights, rows)
    moment = (rows.mT * weights) @ rows
    return moment if total is None else total + moment


def cross_moment(values: Tensor, rows: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_i w_i v_i c_i^T, (d_out, d_in) float64, added to `total` when given.

    Args:
        values: v_i, what the layer should make of each row, (rows, d_out).
        rows: c_i, (rows, d_in).
        weights: w_i, (rows,).
        total: an earlier sum.
    """
    rows, weights = _float64(rows), _weights(weights, rows)
    moment = (_float64(values).mT * weights) @ rows
    return moment if total is None else total + moment


def solve_ridge(cc: Tensor, rc: Tensor, lam: float) -> Tensor:
    """W - W0 of the minimiser of (1) from accumulated sums, for when there are too many rows to hold.

    W - W0 = (sum w (v - W0 c) c^T) (sum w c c^T + lam I)^-1                            (UCE's closed form less W0)

    Args:
        cc: `second_moment` of all rows, preserved ones included.
        rc: `cross_moment` of the edited rows with what is missing, v - W0 c, which is zero for preserved ones.
        lam: pull towards W0, >= 0.

    Returns:
        (d_out, d_in) float64.

    Raises:
        ValueError: when lam is negative, or zero while the rows do not span the space.
    """
    return torch.cholesky_solve(rc.mT, _factored(cc, lam)).mT


def right_factor(
    edited: Tensor,
    edit_weights: Tensor,
    preserved: Tensor,
    preserve_weights: Tensor,
    lam: float,
    moment: Tensor | None = None,
) -> Tensor:
    """The layer-independent factor L_E C_E A^-1 of (2): the update of a layer is `residual @ right_factor(...)`.

    With fewer rows than dimensions it is the first rows of (lam L^-1 + C C^T)^-1 C, which never forms A (push-through
    identity); otherwise A is factored densely.

    Args:
        edited: C_E, (m, d_in).
        edit_weights: (m,), >= 0.
        preserved: C_P, (k, d_in); k may be 0.
        preserve_weights: (k,), >= 0.
        lam: ridge, >= 0. See `ridge`: it is not free of the embeddings' scale.
        moment: further preserved rows as their `second_moment`, (d_in, d_in).

    Returns:
        (m, d_in) float64.

    Raises:
        ValueError: when a weight or lam is negative, or lam is zero and the rows do not span the space.
    """
    edited, preserved = _float64(edited), _float64(preserved).reshape(-1, edited.shape[1])
    edit_weights, preserve_weights = _weights(edit_weights, edited), _weights(preserve_weights, preserved)
    rows, weights = torch.cat([edited, preserved]), torch.cat([edit_weights, preserve_weights])
    used = weights > 0
    if moment is None and lam > 0 and int(used.sum()) < edited.shape[1]:
        gram = rows[used] @ rows[used].mT + torch.diag(lam / weights[used])
        solved = torch.cholesky_solve(rows[used], _cholesky(gram))
        factor = torch.zeros_like(rows)
        factor[used] = solved
        return factor[: len(edited)]
    moment = second_moment(rows, weights, None if moment is None else _float64(moment))
    return edit_weights[:, None] * torch.cholesky_solve(edited.mT, _factored(moment, lam)).mT


def anchored_factors(edited: Tensor, anchors: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (U, V) of the update W0 @ U @ V of every layer that is to treat `edited` rows as it treated `anchors`.

    Targets v_i = W0 g_i make the residual W0 (G - C_E)^T, so the product (G - C_E)^T L_E C_E A^-1 is shared by all
    layers too, and so is its rank: at most the number of distinct differences between anchors and edited rows. A
    layer's bias is in neither: it adds to the output before and after alike.

    Args:
        edited: C_E, (m, d_in).
        anchors: G, (m, d_in), row i replaces edited row i.
        right: `right_factor` of the same edited rows.

    Returns:
        U (d_in, rank) and V (rank, d_in), float64.
    """
    return compress((_float64(anchors) - _float64(edited)).mT, right)


def anchored_update(
    edited: Tensor,
    anchors: Tensor,
    edit_weights: Tensor,
    preserved: Tensor,
    preserve_weights: Tensor,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """`anchored_factors` with its `right_factor`, for any number of rows.

    With more edited rows than dimensions the factors are never formed row by row: sums over the rows,
    (sum_i w_i (g_i - c_i) c_i^T) A^-1, take their place, a part of the rows at a time.

    Args:
        edited: C_E, (m, d_in).
        anchors: G, (m, d_in).
        edit_weights, preserved, preserve_weights, lam: as in `right_factor`.

    Returns:
        U (d_in, rank) and V (rank, d_in), float64.

    Raises:
        ValueError: as `right_factor`.
    """
    if len(edited) <= edited.shape[1]:
        right = right_factor(edited, edit_weights, preserved, preserve_weights, lam)
        return anchored_factors(edited, anchors, right)
    moment = second_moment(preserved.reshape(-1, edited.shape[1]), preserve_weights)
    moved = torch.zeros_like(moment)
    for rows, targets, weights in zip(*(x.split(_PART) for x in (edited, anchors, edit_weights)), strict=True):
        moment = second_moment(rows, weights, moment)
        moved = cross_moment(_float64(targets) - _float64(rows), rows, weights, moved)
    return truncated(torch.cholesky_solve(moved.mT, _factored(moment, lam)).mT)


def recovering_rows(rows: Tensor, moment: Tensor, u: Tensor, v: Tensor, lam: float) -> Tensor:
    """The embeddings that make edited layers W_l = W0_l (I + U V) do for c what the unedited ones did.

        c' = (sum_l W_l^T W_l + lam I)^-1 (sum_l W_l^T W0_l) c                               (RECE, arXiv 2407.12383)

    minimises sum_l |W_l c' - W0_l c|^2 + lam |c'|^2: lam keeps c' where embeddings are.

    Args:
        rows: c, (m, d_in).
        moment: sum_l W0_l^T W0_l, (d_in, d_in).
        u, v: the edit that all these layers share, (d_in, rank) and (rank, d_in).
        lam: >= 0, in units of the layers' squared singular values.

    Returns:
        (m, d_in) float64.

    Raises:
        ValueError: when lam is negative, or zero while an edited direction reaches no layer.
    """
    u, v = _float64(u), _float64(v)
    edited = torch.eye(len(moment), dtype=torch.float64) + u @ v
    crossed = edited.mT @ _float64(moment)
    return torch.cholesky_solve(crossed @ _float64(rows).mT, _factored(crossed @ edited, lam)).mT


def quiet_directions(rows: Tensor, threshold: float, fixed: Tensor) -> Tensor:
    """An orthonormal basis of the directions along which `rows` hardly vary from zero and `fixed` rows not at all.

    Changes of a layer that act on these directions alone leave the rows nearly and the fixed rows exactly where they
    were (SPEED, arXiv 2503.07392).

    Args:
        rows: (k, d_in); k may be 0.
        threshold: directions on which the rows' mean square is below this are quiet.
        fixed: (n, d_in).

    Returns:
        (d_in, quiet directions), float64.
    """
    rows, fixed = _float64(rows), _float64(fixed)
    basis = torch.eye(fixed.shape[1], dtype=torch.float64)
    if len(rows):
        squares, directions = torch.linalg.eigh(second_moment(rows, torch.full((len(rows),), 1 / len(rows))))
        basis = directions[:, squares < threshold]
    _, s, vh = torch.linalg.svd(fixed @ basis, full_matrices=True)
    rank = int((s > RANK_TOLERANCE * float(fixed.norm())).sum())
    return basis @ vh[rank:].mT


def confined_factor(edited: Tensor, basis: Tensor, lam: float) -> Tensor:
    """The factor C_E N (N^T C_E^T C_E N + lam I)^-1 N^T of the best update that acts within a subspace alone.

    With R = V - W0 C_E^T, R times this minimises |(W0 + D) C_E^T - V|^2 + lam |D|^2 over all D = D N N^T.

    Args:
        edited: C_E, (m, d_in).
        basis: N, orthonormal, (d_in, n).
        lam: ridge, > 0.

    Returns:
        (m, d_in) float64.
    """
    inner = _float64(edited) @ basis
    return torch.cholesky_solve(inner.mT, _factored(inner.mT @ inner, lam)).mT @ basis.mT


def compress(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with as few inner dimensions as its numerical rank, split evenly in scale.

    Args:
        left: (a, m).
        right: (m, b).

    Returns:
        (a, rank) and (rank, b), float64; rank may be 0.
    """
    left, right = _float64(left), _float64(right)
    if left.shape[1] >= min(len(left), right.shape[1]):
        return truncated(left @ right)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, v = truncated(r_left @ r_right.mT)
    return q_left @ u, v @ q_right.mT


def truncated(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (a, rank) and (rank, b) of a matrix (a, b), float64, of its numerical rank, split evenly in scale."""
    u, s, vh = torch.linalg.svd(_float64(matrix), full_matrices=False)
    rank = int((s > RANK_TOLERANCE * s.max()).sum()) if s.numel() else 0
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def ridge(lam: float, rows: Tensor, *, relative: bool) -> float:
    """The ridge that `lam` stands for.

    One row c of weight w is moved the fraction w |c|^2 / (lam + w |c|^2) of the way to its target, so an absolute lam
    means something else in every text encoder: lam = 0.5 moves a row of CLIP-L (|c| = 27.7) by 99.9 %, a row of norm 1
    by 67 %. A relative lam is multiplied by the mean |c|^2 of the edited rows and moves a typical lone row by
    w / (lam + w) in any of them.

    Args:
        lam: >= 0.
        rows: the edited rows, (m, d_in).
        relative: scale by the rows' mean squared norm.
    """
    return lam * float(_float64(rows).square().sum(1).mean()) if relative else lam


def _factored(moment: Tensor, lam: float) -> Tensor:
    if lam < 0:
        raise ValueError(f"lam must not be negative, got {lam}.")
    factor = _cholesky(moment + lam * torch.eye(len(moment), dtype=torch.float64))
    # In floating point a singular matrix may still factor, with pivots that are rounding errors.
    pivots = factor.diagonal()
    if lam == 0 and float(pivots.min()) ** 2 <= len(moment) * 2.3e-16 * float(pivots.max()) ** 2:
        raise ValueError(_SINGULAR)
    return factor


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise ValueError(_SINGULAR)
    return factor


_SINGULAR = "The rows do not span the embedding space, so the solution is not unique: use lam > 0 or preserve more."


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _weights(weights: Tensor, rows: Tensor) -> Tensor:
    weights = _float64(weights).reshape(-1)
    if len(weights) != len(rows):
        raise ValueError(f"{len(weights)} weights do not match {len(rows)} rows.")
    if bool((weights < 0).any()):
        raise ValueError(f"Row weights must not be negative, got {float(weights.min())}.")
    return weights
