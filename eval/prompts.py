"""Prompt styles: lmms-eval's defaults (eval.items), and what nanoVLM makes of them."""

from __future__ import annotations

from eval.rules import Item

STYLES = ("lmms-eval", "nanovlm", "nanovlm-v0.1")
# nanoVLM, eval/lmms_eval_wrapper.py: what is replaced in lmms-eval's prompt, by task; an answer begins with "Answer:".
_OPTIONS = {
    "\nOptions:": "\nChoices:",
    "\nA. ": "\nChoices:\nA. ",
    "Please select the correct answer from the options above.": "Answer with the letter.",
    "Answer with the option's letter from the given choices directly": "Answer with the letter directly",
}
_MMMU = {
    "Question:": "",
    "Answer with the option's letter from the given choices directly.": "Answer with the letter directly.",
    "\nA. ": "\nChoices:\nA. ",
}
_REPLACED = {"ai2d": _OPTIONS, "mmstar": _OPTIONS, "seedbench": _OPTIONS, "scienceqa": _OPTIONS, "mmmu_val": _MMMU}
_DOCVQA = (
    "Give a short and terse answer to the following question. Do not paraphrase or reformat the text you see in the "
    "image. Do not include any full stops. Just give the answer without additional explanation. Question: "
)
_TEXTVQA = (
    "Answer the following question about the image using as few words as possible. Follow these additional "
    "instructions:\n-Always answer a binary question with Yes or No.\n-When asked what time it is, reply with the time "
    "seen in the image.\n-Do not put any full stops at the end of the answer.\n-Do not put quotation marks around the "
    "answer.\n-An answer with one or two words is favorable.\n-Do not apply common sense knowledge. The answer can be "
    "found in the image.\nQuestion: "
)
# Its prefix for ChartQA is never used: it stands under a name that no task has.
_BEFORE = {"docvqa_val": _DOCVQA, "textvqa_val": _TEXTVQA}
_AFTER = dict.fromkeys(("infovqa_val", "ocrbench"), "\nGive a very brief answer.")


def styled(task: str, item: Item, style: str) -> tuple[str, str]:
    """(prompt, start of the answer, which stands after the assistant's header) of a task's item in one of STYLES.

    nanovlm-v0.1 is the prompt behind its MMStar of 35.3 (tag v0.1, data/datasets.py), for MMStar alone. Raises
    ValueError for another task.
    """
    if style == "nanovlm-v0.1":
        if task != "mmstar":
            raise ValueError(f"--prompt_style nanovlm-v0.1: is a prompt for mmstar alone, not for {task}")
        return f"Question: {item.question} \nAnswer only with the letter! \nAnswer:", ""
    if style == "lmms-eval":
        return item.prompt, ""
    prompt = _BEFORE.get(task, "") + item.prompt
    for old, new in _REPLACED.get(task, {}).items():
        prompt = prompt.replace(old, new)
    return prompt + _AFTER.get(task, ""), "Answer:" if task in _REPLACED else ""
