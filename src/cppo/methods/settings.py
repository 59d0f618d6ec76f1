"""The settings that papers and public code publish, as specs for ``parse_method`` and ``parse_correction``."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setting:
    """One published setting: a method or a correction with its knobs, and where it stands."""

    label: str
    spec: str  # NAME?knob=value&knob=value
    source: str


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "CPPO, post-trained 1.7B", "cppo?budget=fixed&delta_b=0.015&divergence=topk_tv", "arXiv 2606.10968, App. D"
    ),
    Setting("CPPO, dense base models", "cppo?divergence=topk_tv", "arXiv 2606.10968, App. D"),
    Setting("CPPO, 30B-A3B base", "cppo?delta=0.2&divergence=topk_tv", "arXiv 2606.10968, App. D"),
    Setting("CPPO, KL", "cppo?delta=0.1&delta_b=0.002&divergence=topk_kl", "arXiv 2606.10968"),
    Setting("CPPO, soft gate", "cppo?gate=soft&divergence=topk_tv", "arXiv 2606.10968, Eqs. 19-20"),
    Setting("PPO / GRPO", "grpo?clip_low=0.2&clip_high=0.2", "common default; verl clip_ratio"),
    Setting("DAPO clip-higher", "grpo?clip_low=0.2&clip_high=0.28", "arXiv 2503.14476, sec. 4.1"),
    Setting("GRPO, tuned", "grpo?clip_low=0.2&clip_high=0.27", "DPPO's scaling study; GSPO, sec. 5.1"),
    Setting("dual clip", "grpo?dual_clip=3", "verl clip_ratio_c; many verl recipes 10"),
    Setting("CISPO, cap 5", "cispo?cap=5", "TRL, for ScaleRL; DPPO's scaling study"),
    Setting("CISPO, cap 3", "cispo?cap=3", "DPPO's stability study"),
    Setting("CISPO, cap 1.2", "cispo?cap=1.2", "verl's example: 10 / 0.2"),
    Setting("MinPRO", "minpro?clip_low=0.2&clip_high=0.28", "GRPO's band; not verified"),
    Setting("DPPO, binary TV", "dppo?delta=0.15", "DPPO's stability study; verl"),
    Setting("DPPO, binary TV, scaling", "dppo?delta=0.2&ratio_cap=5", "DPPO's scaling study"),
    Setting("DPPO, binary KL", "dppo?delta=0.05&divergence=binary_kl", "arXiv 2602.04879"),
    Setting("DPPO, top-K TV", "dppo?delta=0.2&divergence=topk_tv", "arXiv 2602.04879, ablation; K = 20"),
    Setting("DPPO, top-K KL", "dppo?delta=0.05&divergence=topk_kl", "arXiv 2602.04879, ablation; K = 20"),
    Setting("DPPO, weight cap 3", "dppo?ratio_cap=3", "verl's clip_ratio_c unless it is set; its recipe sets 10000"),
    Setting("DPPO, weight cap 20", "dppo?ratio_cap=20", "the authors' code; Stable-RL's fallback is 10"),
    Setting("TRM-Max", "trm_max?max_threshold=0.05&divergence=exact_kl", "arXiv 2512.23075"),
    Setting("TRM-Avg", "trm_avg?avg_threshold=0.001&divergence=exact_kl", "arXiv 2512.23075"),
    Setting("TRM-Max & Avg", "trm?max_threshold=0.1&avg_threshold=0.002&divergence=exact_kl", "arXiv 2512.23075"),
    Setting(
        "TRM, sampled",
        "trm?max_threshold=0.1&avg_threshold=0.002&divergence=k2&avg_divergence=k3",
        "arXiv 2512.23075; the thresholds are those of the exact KL",
    ),
    Setting(
        "TRM, CPPO's thresholds",
        "trm?max_threshold=0.15&avg_threshold=0.02&divergence=topk_tv",
        "arXiv 2606.10968, ablation",
    ),
    Setting("GSPO", "gspo?clip_low=3e-4&clip_high=4e-4", "arXiv 2507.18071, sec. 5.1"),
    Setting("SAPO", "sapo?tau_pos=1.0&tau_neg=1.05", "TRL, verl"),
    Setting("DRPO", "drpo?delta=12.5", "UniRL"),
    Setting("DRPO as a trust region", "drpo?delta=0.15", "DPPO's range; not published"),
    Setting("GMPO", "gmpo?log_clip_low=0.4&log_clip_high=0.4", "TRL, verl's example"),
    Setting("IPO", "ipo?delta=0.3", "prime-rl since September 2026; 0.1 before"),
    Setting("ESTR", "estr?epsilon=0.01", "secondary text; tau was not found and must be given"),
    Setting("IcePop", "icepop?low=0.5&high=5", "Ring-1T report"),
    Setting("Token-TIS", "tis?scope=token&cap=2", "verl; usual range 1.5 to 5"),
    Setting("Seq-TIS", "tis?scope=sequence&cap=2", "verl; usual range 2 to 10"),
    Setting("Token-MIS", "mis?scope=token&high=2", "verl's threshold"),
    Setting("Seq-MIS", "mis?scope=sequence&high=3", "TRL's default for vLLM"),
    Setting("Geometric mask", "geometric_mask?low=0.999&high=1.001", "verl's presets"),
)
