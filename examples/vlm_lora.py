"""Fine-tune adapters (LoRA) of a vision-language model on easy-VQA; GradES freezes each one when it has converged.

    python examples/vlm_lora.py                                            # a tiny random LLaVA, no network
    python examples/vlm_lora.py --model HuggingFaceTB/SmolVLM-256M-Instruct --learning_rate 2e-4

With transformers' Trainer, the model's own processor and a collator. Each tower has its tau.
"""

import random
from typing import Any

from common import make_callback, parser, tau, tiny_tokenizer, train, trainer_arguments

IMAGE_TOKEN = "<image>"
TINY_IMAGE_SIZE, TINY_PATCH_SIZE = 64, 16
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0], "grades_output/vlm_lora", learning_rate=1e-3, max_steps=60)
    made.add_argument("--model", help="hub id or local folder; default: a tiny LLaVA with random weights")
    made.add_argument("--lora_rank", type=int, default=16)
    made.add_argument("--vision_tau", type=tau, default="auto", help="freeze a vision matrix below this; or auto")
    made.add_argument("--language_tau", type=tau, default="auto", help="the same for the language model")
    given = made.parse_args(argv)

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from grades import VLMGradEarlyStoppingCallback, VLMGradEarlyStoppingConfig

    config = VLMGradEarlyStoppingConfig(
        vision_tau=given.vision_tau, language_tau=given.language_tau, alpha=given.alpha, output_dir=given.output_dir
    )
    callback = make_callback(VLMGradEarlyStoppingCallback, config)
    set_seed(given.seed)
    rows = questions(given.max_steps * given.batch_size * given.gradient_accumulation_steps, given.seed)
    model, processor = load(given.model) if given.model else tiny_llava([row["question"] for row in rows[:1000]])
    trainer = Trainer(
        model=get_peft_model(model, LoraConfig(r=given.lora_rank, target_modules="all-linear")),
        args=TrainingArguments(**trainer_arguments(given), remove_unused_columns=False),
        train_dataset=rows,
        data_collator=Collator(processor),
        callbacks=[callback],
    )
    train(trainer, callback, given.output_dir)


def questions(limit: int, seed: int) -> list[dict]:
    """At most `limit` questions of easy-VQA, each with the path of its image."""
    from data import easy_vqa

    rows = [
        {"image": row["images"][0], "question": text["user"], "answer": text["assistant"]}
        for row in easy_vqa.rows("train")
        for text in row["texts"]
    ]
    random.Random(seed).shuffle(rows)
    return rows[:limit]


class Collator:
    """Rows -> batch of the processor: images opened, text by the chat template, labels on the answers only."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        processor.tokenizer.padding_side = "right"

    def __call__(self, rows: list[dict]) -> Any:
        from PIL import Image

        questions = [turn("user", row["question"], image=True) for row in rows]
        prompts = [self._text([question], True) for question in questions]
        answered = zip(questions, rows, strict=True)
        texts = [self._text([question, turn("assistant", row["answer"])], False) for question, row in answered]
        images = [[Image.open(row["image"]).convert("RGB")] for row in rows]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone().fill_(-100)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            answer = self.processor.tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
            end = int(batch["attention_mask"][i].sum())
            labels[i, end - len(answer) : end] = batch["input_ids"][i, end - len(answer) : end]
        return batch | {"labels": labels}

    def _text(self, messages: list[dict], is_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)


def turn(role: str, text: str, image: bool = False) -> dict:
    """A message as chat templates take it, the image before the text."""
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def load(name: str) -> tuple:
    """A vision-language model in float32 and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(name)
    except OSError as error:
        raise SystemExit(f"--model {name}: must be a hub id or a local folder; {error}") from None


def tiny_llava(texts: list[str]) -> tuple:
    """A LLaVA with two blocks per tower and random weights, and its processor."""
    import transformers

    print("No --model: training a tiny LLaVA with random weights.")
    tokenizer = tiny_tokenizer(texts, (IMAGE_TOKEN,))
    blocks: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    blocks["num_hidden_layers"] = 2
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**blocks, image_size=TINY_IMAGE_SIZE, patch_size=TINY_PATCH_SIZE),
        text_config=transformers.LlamaConfig(**blocks, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
    )
    size = {"height": TINY_IMAGE_SIZE, "width": TINY_IMAGE_SIZE}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=TINY_PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=TINY_CHAT_TEMPLATE,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


if __name__ == "__main__":
    main()
