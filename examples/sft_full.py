"""Fine-tune all weights of a language model with TRL's SFTTrainer; GradES freezes each matrix when it has converged.

    python examples/sft_full.py                                  # minutes on a CPU, no network
    python examples/sft_full.py --model Qwen/Qwen3-0.6B --preset qwen3-0.6b/full --max_steps 1000

The text: docstrings of Python's standard library, as questions and answers.
"""

from common import fine_tune, language_parser


def main(argv: list[str] | None = None) -> None:
    made = language_parser(__doc__.splitlines()[0], "grades_output/sft_full", learning_rate=2e-5)
    fine_tune(made.parse_args(argv))


if __name__ == "__main__":
    main()
