"""Made-up lines of finished runs, and a study to which they belong."""

from cppo.compare.study import make_study

CONTENT = {
    "title": "made up",
    "seeds": {"first": 0, "count": 6},
    "base": {"epochs": 4, "rollouts": 2},
    "settings": {"calm": {"learning_rate": 1e-4}, "wild": {"learning_rate": 1e-3, "epochs": 3}},
    "arms": {"cppo": "cppo", "grpo": {"method": "grpo"}, "none": {"method": "policy_gradient", "learning_rate": 2e-4}},
    "reference": "cppo",
}
SEARCH = {
    "seeds": {"first": 100, "count": 2}, "factors": [1, 0.5],
    "knobs": {"cppo": ["cppo?delta_b=0.03"], "grpo": ["grpo?clip_low=0.1&clip_high=0.1"]},
}  # fmt: skip


def study(**changes):
    return make_study(CONTENT | changes)


def line(cell, accuracy, **changes):
    """The line of a cell whose evaluations are these."""
    curves = {name: [0.1, 0.2] for name in ("gap", "kl", "entropy", "gradient_norm", "masked", "reward", "length")}
    row = {
        "key": cell.key, "setting": cell.setting, "arm": cell.arm, "seed": cell.seed, "method": cell.config.method,
        "learning_rate": cell.config.learning_rate, "rollout": list(range(len(accuracy))), "accuracy": list(accuracy),
        "standard_error": [0.02] * len(accuracy), "curves": curves, "tail": [0.3, 0.5], "cpu_seconds": 36.0,
        "wall_seconds": 40.0, "diverged": False, "config": cell.content, "versions": {"cppo": "0.1.0"},
    }  # fmt: skip
    return row | changes


def lines(cells, accuracy):
    """Lines of these cells; ``accuracy(cell)`` gives the evaluations."""
    return [line(cell, accuracy(cell)) for cell in cells]
