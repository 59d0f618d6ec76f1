"""Documents for the page, made up: small ones, hostile ones, long ones."""

import math

SPECS = ("cppo?delta=0.05&delta_b=0.004", "dppo", "grpo")
HOSTILE = (
    '</script><script>window.ran = 1</script><img src=x onerror="window.ran = 2"><b>bold</b> &lt; %{y} \u2028\u202e\x07'
)


def make_method(spec, *, steps, shift=0.0, budget=0.0):
    ramp = [shift + 0.01 * index for index in range(steps)]
    return {
        "spec": spec, "name": spec.partition("?")[0], "masked": 0.0393795 + shift,
        "by_token_threshold": 0.0072175 + shift, "by_prefix_budget": budget, "by_other_rule": 0.0,
        "masked_positive": 0.1 + shift if shift else None, "masked_negative": 0.1 + 0.2,
        "weight_left": 0.930597 - shift, "differs": 0.000012 + shift, "masked_by_step": ramp,
        "budget_by_step": [value / 2 for value in ramp], "delta_b_by_step": [0.004] * steps if budget else None,
        "masked_by_position": [0.001 * index for index in range(24)],
        "budget_by_position": [0.0005 * index for index in range(24)],
        "masked_positive_by_probability": [None, 0.3 + shift, 0.2, 0.1, 0.05, 0.01],
        "masked_negative_by_probability": [None, 0.6, 0.4 + shift, 0.2, 0.1, 0.02],
    }  # fmt: skip


def make_example(*, tokens=("The", " answer", "\n", "is", "", " 4"), step=1, why="most rejected", prompt="2+2="):
    """Return one response: token 2 rejected by the threshold, 3 by the budget, 4 is tool output."""
    count = len(tokens)
    codes = [(0, 1, 2, 0)[place % 4] for place in range(count)]
    mask = [place % 4 != 3 for place in range(count)]
    divergence = [0.02 + 0.3 * (place % 4 == 1) for place in range(count)]
    weight = [1 - 0.2 * place / max(1, count - 1) for place in range(count)]
    spending = [w * d for w, d in zip(weight, divergence, strict=True)]
    prior = [0.0]
    for w, z in zip(weight, spending, strict=True):
        prior.append(prior[-1] + 0.004 * w - z)
    own = {
        "position_weight": weight, "divergence": divergence, "weighted_divergence": spending,
        "prior_account": prior[:-1], "threshold": [min(0.05, 0.05 + u) for u in prior[:-1]], "delta_b": 0.004,
        "rejected_by": codes, "coefficient": [float(code == 0) for code in codes],
    }  # fmt: skip
    token_rule = {
        "divergence": divergence, "threshold": [0.15] * count, "rejected_by": [int(code == 1) for code in codes],
        "coefficient": [float(code != 1) for code in codes],
    }  # fmt: skip
    clip = {"rejected_by": [3 * (code == 1) for code in codes], "coefficient": [1.0] * count}
    return {
        "file": "step-000001.parquet", "row": 7, "step": step, "reward": 1.0, "advantage": 1.61984, "prompt": prompt,
        "response": "".join(tokens), "tokens": list(tokens), "token_ids": list(range(100, 100 + count)),
        "logp": [math.log(0.5)] * count, "rollout_logp": [math.log(0.25)] * count, "response_mask": mask,
        "methods": dict(zip(SPECS, (own, token_rule, clip), strict=True)), "why": why,
    }  # fmt: skip


def make_run(name="first", *, steps=12, examples=None, hostile=""):
    names = (
        "reward", "length", "no_advantage", "probability_gap", "probability_gap_tail", "relative_log_prob_error",
        "log_perplexity_gap", "mean_log_ratio", "kl_k3", "chi_squared", "effective_sample_size", "equal_log_probs",
        "below_sampler", "largest_response",
    )  # fmt: skip
    grid = [[0.2 / (row + 1) / (column + 1) for column in range(3)] for row in range(2)]
    return {
        "name": name, "method": SPECS[0], "files": 1, "responses": 64, "tokens": 153100,
        "steps": list(range(1, steps + 1)), "divergence": "measured",
        "series": {key: [0.1 + 0.01 * index for index in range(steps - 1)] + [None] for key in names},
        "positions": {
            "mean": [0.01] * 24, "tail": [0.1] * 24, "tokens": [50] * 24,
            "allowance": [0.05 + 0.001 * index for index in range(24)], "allowance_note": None,
        },
        "probabilities": {
            "edges": [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0],
            "tokens_positive": [0, 12, 345, 6789, 10111, 50000], "tokens_negative": [0, 21, 543, 9876, 11110, 60000],
        },
        "methods": [
            make_method(SPECS[0], steps=steps, budget=0.032162), make_method(SPECS[1], steps=steps, shift=0.05),
            make_method(SPECS[2], steps=steps, shift=0.01),
        ],
        "left_out": {"drpo": "needs the rollout policy's entropy"},
        "rejected_tokens": [
            {"id": 7, "text": " answer", "count": 40, "rejected": 12},
            {"id": 9, "text": hostile or None, "count": 5, "rejected": 4},
        ],
        "suggestion": {
            "wanted": 0.02, "settings": {"divergence": "binary_tv", "w_min": 0.8, "budget": "adaptive"},
            "token_delta": 0.0483732, "delta": 0.108876, "delta_b": None, "masked": float("nan"),
            "paper": {"delta": 0.15, "delta_b": 0.02, "w_min": 0.8, "masked": 0.0302351},
            "grid": {"delta": [0.02, 0.05], "delta_b": [0.002, 0.005, 0.01], "masked": grid}, "tokens": 153100,
        },
        "findings": [
            {"level": "problem", "title": "The run collapsed" + hostile, "text": "It fell." + hostile,
             "numbers": {"peak_reward": 0.1 + 0.2, "last_reward": 1.3922895180127982e-07}},
            {"level": "note", "title": "Early drift", "text": "It sits early.", "numbers": {}},
        ],
        "examples": [make_example(), make_example(step=5, why="largest drift", prompt="7*6=")] if examples is None
        else examples,
    }  # fmt: skip


def make_document(*runs):
    return {"format": 1, "runs": list(runs) or [make_run()]}


def make_curve(label="first"):
    nan = float("nan")
    return {
        "label": label, "steps": [0, 1, 2, 3], "accuracy": [0.275390625, None, None, 0.908203125],
        "standard_error": [0.0198, None, None, 0.012773], "reward": [None, 0.3, nan, 0.5],
    }  # fmt: skip


def make_hostile_document():
    """Return markup, scripts, control characters and a lone surrogate in every text."""
    bad = HOSTILE + "\ud800"
    example = make_example(tokens=[bad, "\u202egnol", "a\x00b", bad], why=bad, prompt=bad * 3)
    example |= {"file": bad, "methods": {bad: example["methods"][SPECS[0]]}}
    run = make_run(bad, examples=[example], hostile=bad) | {"method": bad, "left_out": {bad: bad}, "divergence": bad}
    run["methods"] = [run["methods"][0] | {"spec": bad, "name": bad}]
    run["findings"][0]["numbers"] = {bad: 1.5}
    run["suggestion"]["settings"] |= {"divergence": bad}
    return make_document(run, make_run("<b>beside</b>"))
