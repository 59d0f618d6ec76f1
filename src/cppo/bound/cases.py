"""Problems with the settings of a trust region, brought to the edge of a statement's premises."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import numpy as np

from cppo.bound.enumeration import Account, Enumeration
from cppo.bound.policies import Array, Problems, draw_problems, quotient


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """The trust region of each of n problems."""

    delta: Array  # [n]
    delta_b: Array  # [n]
    w_min: Array  # [n], of Eq. 9
    eta: Array  # [n]: the slack of Prop. 8
    edge: Array  # [n] in [0, 1]: how far toward the edge of the premises the policy goes
    weight: Array  # [n, T]: any weights with (T - t) / w_t non-increasing, for the statements that allow any


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Problems, settings, and what follows from them."""

    problems: Problems
    settings: Settings

    @functools.cached_property
    def found(self) -> Enumeration:
        """The problems as they are, no trust region."""
        return Enumeration(self.problems)

    @functools.cached_property
    def linear_weight(self) -> Array:
        """Eq. 9: w_t = 1 - (1 - w_min)(t - 1) / (T - 1), ``[n, T]``."""
        T, w_min = self.problems.T, self.settings.w_min[:, None]
        t = quotient(np.arange(T)[None], np.full((1, T), max(T - 1, 1)), exact=self.problems.exact)
        return np.asarray(1 - (1 - w_min) * t)

    @functools.cached_property
    def within_theorem(self) -> tuple[Enumeration, Account]:
        """Theorem 1's premises: Z_t <= c_t, and S_m <= delta_b W_m for all m < T; any monotone weights."""
        account = self._account(self.found, self.settings.weight)
        share = self._share([*_rule(account), _prefixes(account)])
        return self._at(share, self.settings.weight)

    @functools.cached_property
    def within_slack(self) -> tuple[Enumeration, Account]:
        """Prop. 8's: S_m <= delta_b W_m + eta for all m < T; any monotone weights."""
        account = self._account(self.found, self.settings.weight)
        prefixes, budget = _prefixes(account)
        share = self._share([(prefixes, budget + self.settings.eta[:, None, None])])
        return self._at(share, self.settings.weight)

    @functools.cached_property
    def within_rule(self) -> tuple[Enumeration, Account]:
        """Eq. 8 alone: Z_t <= c_t on every path; Eq. 9's weights."""
        return self._at(self._share(_rule(self._account(self.found, self.linear_weight))), self.linear_weight)

    @functools.cached_property
    def within_average(self) -> Enumeration:
        """TRM-Avg's: of the prefix premises only D_1 + .. + D_{T-1} <= (T - 1) delta_b."""
        drift = self.found.path_divergence[:, :, :-1].sum(axis=2)
        allowed = (self.problems.T - 1) * self.settings.delta_b[:, None]
        return Enumeration(self.problems.moved(self._share([(drift, allowed)])))

    def _account(self, found: Enumeration, weight: Array) -> Account:
        return Account(found, weight, self.settings.delta, self.settings.delta_b)

    def _at(self, share: Array, weight: Array) -> tuple[Enumeration, Account]:
        found = Enumeration(self.problems.moved(share))
        return found, self._account(found, weight)

    def _share(self, limits: list[tuple[Array, Array]]) -> Array:
        """Return how far pi may go from mu, ``[n]``: each ``spent``, linear in it, may reach ``allowed``."""
        share = np.ones_like(self.settings.edge)
        for spent, allowed in limits:
            used = spent > 0
            largest = np.where(used, np.broadcast_to(allowed, spent.shape) / np.where(used, spent, 1), 1)
            if largest.size:
                share = np.minimum(share, largest.reshape(len(share), -1).min(axis=1))
        return np.asarray(share * self.settings.edge)


def _rule(account: Account) -> list[tuple[Array, Array]]:
    # Z_t <= c_t is Z_t <= delta and S_t <= delta + delta_b W_{t-1}; the first deposit's allowance is delta itself.
    return [(account.weighted, account.allowance[:, :, :1]), (account.spent, account.allowance)]


def _prefixes(account: Account) -> tuple[Array, Array]:
    return account.spent[:, :, :-1], account.budget[:, :, :-1]


def draw_settings(rng: np.random.Generator, count: int, T: int) -> Settings:
    """Draw settings, as fractions; ``settings_as`` turns them."""

    def some(*values: Fraction) -> Array:
        return np.array(values, dtype=object)[rng.integers(len(values), size=count)]

    F = Fraction
    w_min = some(F(1, 10), F(3, 5), F(4, 5), F(1))
    # (T - t) / w_t = g_t with g falling by steps that may be 0; the last weight is free.
    falls = np.cumsum(rng.integers(0, 5, size=(count, T)), axis=1)[:, ::-1] + 4
    weight = quotient(np.arange(T - 1, -1, -1)[None] + np.zeros_like(falls), falls, exact=True)
    weight[:, -1] = quotient(rng.integers(1, 9, size=count), np.full(count, 8), exact=True)
    linear = rng.random(count) < 0.5
    steps = quotient(np.arange(T), np.full(T, max(T - 1, 1)), exact=True)
    weight = np.where(linear[:, None], 1 - (1 - w_min[:, None]) * steps[None], weight)
    return Settings(
        delta=some(F(1, 20), F(3, 20), F(1, 5), F(2, 5)),
        delta_b=some(F(1, 100), F(1, 50), F(1, 10)),
        w_min=w_min,
        eta=some(F(0), F(1, 100), F(3, 20)),
        edge=some(F(1), F(1), F(1, 2)),
        weight=weight,
    )


def settings_as(settings: Settings, *, exact: bool) -> Settings:
    """Return fractions as they are, or as float64."""
    if exact:
        return settings
    values = {f.name: getattr(settings, f.name).astype(np.float64) for f in dataclasses.fields(settings)}
    return Settings(**values)


def draw_cases(rng: np.random.Generator, count: int, V: int, T: int, *, exact: int) -> tuple[Case, Case | None]:
    """Return ``count`` cases in float64, and the first ``exact`` of them in fractions."""
    draw, settings = draw_problems(rng, count, V, T), draw_settings(rng, count, T)
    rounded = Case(draw.problems(exact=False), settings_as(settings, exact=False))
    if not exact:
        return rounded, None
    first = {f.name: getattr(settings, f.name)[:exact] for f in dataclasses.fields(settings)}
    return rounded, Case(draw.take(exact).problems(exact=True), Settings(**first))
