"""Fine-tune adapters (LoRA) of a language model with TRL's SFTTrainer; GradES freezes each one when it has converged.

    python examples/sft_lora.py                                  # minutes on a CPU, no network
    python examples/sft_lora.py --model Qwen/Qwen3-0.6B --preset qwen3-0.6b/lora --max_steps 1000

The text: docstrings of Python's standard library, as questions and answers.
"""

from common import fine_tune, language_parser


def main(argv: list[str] | None = None) -> None:
    made = language_parser(__doc__.splitlines()[0], "grades_output/sft_lora", learning_rate=2e-4)
    made.add_argument("--lora_rank", type=int, default=32)
    given = made.parse_args(argv)

    from peft import LoraConfig

    fine_tune(given, LoraConfig(r=given.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))


if __name__ == "__main__":
    main()
