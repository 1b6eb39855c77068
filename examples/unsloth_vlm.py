"""Fine-tune 4-bit Qwen2.5-VL-7B with Unsloth on easy-VQA; GradES freezes each adapter when it has converged.

    python examples/unsloth_vlm.py --max_steps 500          # needs a CUDA GPU and the package unsloth

The settings are the paper's Table 10; the other examples run anywhere.
"""

import importlib.util

import torch
from common import make_callback, parser, train, trainer_arguments
from vlm_lora import questions


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0], "grades_output/unsloth_vlm", learning_rate=2e-4, max_steps=500)
    made.add_argument("--model", default="unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit", help="hub id or local folder")
    made.add_argument("--lora_rank", type=int, default=32)
    made.add_argument("--max_length", type=int, default=4096, help="tokens per row")
    given = made.parse_args(argv)
    if not torch.cuda.is_available() or importlib.util.find_spec("unsloth") is None:
        raise SystemExit("needs a CUDA GPU and the package unsloth (pip install unsloth); vlm_lora.py runs anywhere")

    from unsloth import FastVisionModel  # isort: skip  # before what it patches
    from trl import SFTConfig, SFTTrainer
    from unsloth.trainer import UnslothVisionDataCollator

    from grades import VLMGradEarlyStoppingCallback, presets

    config = presets["qwen2.5-vl-7b/lora"]
    config.alpha, config.output_dir = given.alpha, given.output_dir
    callback = make_callback(VLMGradEarlyStoppingCallback, config)
    model, processor = FastVisionModel.from_pretrained(given.model, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(
        model, finetune_vision_layers=True, finetune_language_layers=True, r=given.lora_rank,
        lora_alpha=given.lora_rank, random_state=given.seed,
    )  # fmt: skip
    FastVisionModel.for_training(model)
    rows = questions(given.max_steps * given.batch_size * given.gradient_accumulation_steps, given.seed)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(given), max_length=given.max_length, remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=[conversation(row) for row in rows],
        data_collator=UnslothVisionDataCollator(model, processor),
        processing_class=processor,
        callbacks=[callback],
    )  # fmt: skip
    train(trainer, callback, given.output_dir)


def conversation(row: dict) -> dict:
    """A row as Unsloth's collator takes it."""
    from PIL import Image

    image = Image.open(row["image"]).convert("RGB")
    asked = [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}]
    answered = [{"type": "text", "text": row["answer"]}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


if __name__ == "__main__":
    main()
