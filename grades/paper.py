"""The settings of the paper's tables 9 and 10 (arXiv:2509.01842).

>>> from grades import presets
>>> presets["qwen3-0.6b/lora"].tau
0.001183

`GradEarlyStoppingCallback(presets["qwen3-0.6b/lora"])` trains with them.
"""

from collections.abc import Iterator, Mapping

from grades.callback_config import GradEarlyStoppingConfig, VLMGradEarlyStoppingConfig

# Model: tau of full fine-tuning, tau of LoRA.
TABLE_9 = {
    "qwen3-14b": (6.387926, 0.025181),
    "phi4-14b": (3.512882, 0.025181),
    "qwen3-0.6b": (1.804456, 0.001183),
    "llama-3.1-8b": (2.404167, 0.021637),
    "mistral-7b": (2.726866, 0.029591),
}
TABLE_9_ALPHA = 0.55
# Model: vision tau, language tau, alpha, compute interval.
TABLE_10 = {
    "qwen2.5-vl-7b/lora": (3.3, 33.0, 0.30, 1),
    "qwen2.5-vl-7b/full-4bit": (0.13, 0.09, 0.30, 1),
    "nanovlm": (0.30, 6.00, 0.28, 20),
    "nanovlm-alt": (6.30, 3.90, 0.28, 20),
}


class Presets(Mapping[str, VLMGradEarlyStoppingConfig]):
    """A new configuration by its name: "model/full" and "model/lora" of Table 9, the names of Table 10.

    The metric is always weight_change: the paper defines gradient metrics, but the authors' code, whose examples have
    these taus, measures the change of the weights.
    """

    def __getitem__(self, name: str) -> VLMGradEarlyStoppingConfig:
        """Raises KeyError with the names there are."""
        model, _, method = name.rpartition("/")
        if name in TABLE_10:
            vision, language, alpha, interval = TABLE_10[name]
            return VLMGradEarlyStoppingConfig(
                vision_tau=vision, language_tau=language, alpha=alpha, compute_interval=interval
            )
        if model not in TABLE_9 or method not in ("full", "lora"):
            raise KeyError(f"{name}: no such preset; there are {', '.join(self)}")
        full, lora = TABLE_9[model]
        return GradEarlyStoppingConfig(tau=full if method == "full" else lora, alpha=TABLE_9_ALPHA)

    def __iter__(self) -> Iterator[str]:
        yield from (f"{model}/{method}" for model in TABLE_9 for method in ("full", "lora"))
        yield from TABLE_10

    def __len__(self) -> int:
        return 2 * len(TABLE_9) + len(TABLE_10)


presets = Presets()
