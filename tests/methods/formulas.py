"""The papers' formulas in plain Python: loops over numbers, in double precision, with nothing of the library."""

from __future__ import annotations

import math

Matrix = list[list[float]]


def product(A: Matrix, B: Matrix) -> Matrix:
    """A·B."""
    return [[sum(A[i][k] * B[k][j] for k in range(len(B))) for j in range(len(B[0]))] for i in range(len(A))]


def add(A: Matrix, B: Matrix, s: float = 1.0) -> Matrix:
    """A + s·B."""
    return [[a + s * b for a, b in zip(x, y, strict=True)] for x, y in zip(A, B, strict=True)]


def transposed(A: Matrix) -> Matrix:
    """Aᵀ."""
    return [list(column) for column in zip(*A, strict=True)]


def norms(A: Matrix) -> list[float]:
    """The Euclidean norm of each row."""
    return [math.sqrt(sum(a * a for a in row)) for row in A]


def lora(W: Matrix, A: Matrix, B: Matrix, r: int, alpha: float) -> Matrix:
    """W + (alpha / r) B A (Hu et al. 2021, section 4.1)."""
    return add(W, product(B, A), alpha / r)


def rslora(W: Matrix, A: Matrix, B: Matrix, r: int, alpha: float) -> Matrix:
    """W + (alpha / sqrt(r)) B A (Kalajdzievski 2023)."""
    return add(W, product(B, A), alpha / math.sqrt(r))


def dora(W: Matrix, A: Matrix, B: Matrix, m: list[float], r: int, alpha: float) -> Matrix:
    """m (W + s B A) / ||W + s B A||, a norm for each output (Liu et al. 2024, eq. 5)."""
    V = lora(W, A, B, r, alpha)
    return [[m[i] * v / n for v in row] for i, (row, n) in enumerate(zip(V, norms(V), strict=True))]


def trainable_tokens(rows: Matrix, tokens: list[int], new: Matrix) -> Matrix:
    """The rows of an embedding (vocabulary, dim), those of `tokens` replaced."""
    out = [list(row) for row in rows]
    for token, row in zip(tokens, new, strict=True):
        out[token] = list(row)
    return out


def linear(W: Matrix, b: list[float] | None, X: Matrix) -> Matrix:
    """X Wᵀ + b."""
    Y = product(X, transposed(W))
    return Y if b is None else [[y + c for y, c in zip(row, b, strict=True)] for row in Y]


def lookup(rows: Matrix, ids: list[int]) -> Matrix:
    """The rows of an embedding."""
    return [list(rows[i]) for i in ids]
