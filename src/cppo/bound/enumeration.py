"""Every quantity of the theory by its definition, summed over all V^T responses. Nothing of the package is used here.

Responses and prefixes are in lexicographic order, so that those which begin with prefix i of t tokens are V^{T-t}
neighbours, the i-th such block. t counts from 0 in the code: index t stands for the paper's t + 1.
"""

from __future__ import annotations

import functools

import numpy as np

from cppo.bound.policies import Array, Problems


class Enumeration:
    """The quantities of n problems; arrays have the problems first."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    @functools.cached_property
    def mu_chances(self) -> list[Array]:
        """Of each prefix of t = 0..T tokens its probability under mu, ``[n, V^t]`` each."""
        return _chances(self.problems.mu)

    @functools.cached_property
    def pi_chances(self) -> list[Array]:
        """The same under pi."""
        return _chances(self.problems.pi)

    @functools.cached_property
    def ratio(self) -> list[Array]:
        """rho_t of each response, ``[n, V^T]``, for t = 1..T."""
        V, T = self.problems.V, self.problems.T
        laws = zip(self.problems.pi, self.problems.mu, strict=True)
        return [np.repeat((p / m).reshape(len(p), -1), V ** (T - t - 1), axis=1) for t, (p, m) in enumerate(laws)]

    @functools.cached_property
    def divergence(self) -> list[Array]:
        """D_t after each prefix: half the sum of |pi - mu| over the letters, ``[n, V^{t-1}]``, for t = 1..T."""
        return [_tv(p, m) for p, m in zip(self.problems.pi, self.problems.mu, strict=True)]

    @functools.cached_property
    def mean_divergence(self) -> Array:
        """u_t = E_mu[D_t], ``[n, T]``."""
        return np.stack([(c * d).sum(axis=1) for c, d in zip(self.mu_chances, self.divergence, strict=False)], axis=1)

    @functools.cached_property
    def limit(self) -> Array:
        """l_t: the largest D_t over all prefixes, ``[n, T]``."""
        return np.stack([d.max(axis=1) for d in self.divergence], axis=1)

    @functools.cached_property
    def higher_order(self) -> Array:
        """mu(y) sum_t (rho_t - 1)(1 - rho_{t+1:T}) of each response, ``[n, V^T]``."""
        total, after = 0 * self.mu_chances[-1], 1 + 0 * self.mu_chances[-1]
        for rho in reversed(self.ratio):
            total = total + (rho - 1) * (1 - after)
            after = after * rho
        return np.asarray(self.mu_chances[-1] * total)

    @functools.cached_property
    def reward(self) -> Array:
        """R(y), ``[n, V^T]``, the worst where that was asked for."""
        problems = self.problems
        extreme = np.where(self.higher_order > 0, problems.xi[:, None], -problems.xi[:, None])
        sign = problems.worst[:, None]
        return np.where(sign == 0, problems.reward, sign * extreme)

    @functools.cached_property
    def improvement(self) -> Array:
        """J(pi) - J(mu), ``[n]``."""
        return np.asarray((self.reward * (self.pi_chances[-1] - self.mu_chances[-1])).sum(axis=1))

    @functools.cached_property
    def surrogate(self) -> Array:
        """L' = E_mu[R sum_t (rho_t - 1)], ``[n]``."""
        first_order = self.mu_chances[-1] * sum(rho - 1 for rho in self.ratio)
        return np.asarray((self.reward * first_order).sum(axis=1))

    @functools.cached_property
    def residual(self) -> Array:
        """Delta = E_mu[R sum_t (rho_t - 1)(1 - rho_{t+1:T})], ``[n]``."""
        return np.asarray((self.reward * self.higher_order).sum(axis=1))

    @functools.cached_property
    def suffix_tv(self) -> list[Array]:
        """TV between the laws of y_{t+1:T} under mu and under pi after each prefix of t, ``[n, V^t]``, t = 1..T."""
        mu, pi = (_suffix_laws(laws, self.problems.V) for laws in (self.problems.mu, self.problems.pi))
        return [_tv(p, m) for p, m in zip(pi, mu, strict=True)]

    @functools.cached_property
    def path_divergence(self) -> Array:
        """D_1..D_T along each prefix of T - 1 tokens, which are all that decide them, ``[n, V^{T-1}, T]``."""
        V, T = self.problems.V, self.problems.T
        return np.stack([np.repeat(d, V ** (T - 1 - t), axis=1) for t, d in enumerate(self.divergence)], axis=2)


class Account:
    """Eq. 8 along every path: ``[n, paths, T]`` each, from weights ``[n, T]`` and delta, delta_b ``[n]``."""

    def __init__(self, found: Enumeration, weight: Array, delta: Array, delta_b: Array) -> None:
        self.weighted = weight[:, None, :] * found.path_divergence  # Z_t
        self.spent = np.cumsum(self.weighted, axis=2)  # S_t
        self.weight = np.cumsum(weight, axis=1)[:, None, :]  # W_t
        earlier = self.weight - weight[:, None, :]  # W_{t-1}
        delta, delta_b = delta[:, None, None], delta_b[:, None, None]
        self.budget = delta_b * self.weight  # delta_b W_t
        self.allowance = delta + delta_b * earlier  # what S_t may be: delta + delta_b W_{t-1}
        self.threshold = np.minimum(delta, self.allowance - (self.spent - self.weighted))  # c_t


def _tv(p: Array, q: Array) -> Array:
    return np.asarray(np.abs(p - q).sum(axis=-1) / 2)


def _chances(laws: tuple[Array, ...]) -> list[Array]:
    chances = [np.ones((len(laws[0]), 1), dtype=laws[0].dtype)]
    for law in laws:
        chances.append((chances[-1][:, :, None] * law).reshape(len(law), -1))
    return chances


def _suffix_laws(laws: tuple[Array, ...], V: int) -> list[Array]:
    """Return the law of y_{t+1:T} given each prefix of t tokens, ``[n, V^t, V^{T-t}]``, for t = 1..T."""
    found = [np.ones((len(laws[0]), V ** len(laws), 1), dtype=laws[0].dtype)]
    for law in reversed(laws[1:]):
        count, prefixes, _ = law.shape
        rest = found[0].reshape(count, prefixes, V, -1)
        found.insert(0, (law[:, :, :, None] * rest).reshape(count, prefixes, -1))
    return found
