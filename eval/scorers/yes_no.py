"""Yes or no: POPE and HallusionBench."""

from eval.scorers.judged import Judged, judged


def pope_exact(answer: str, truth: str) -> Judged:
    """POPE in lmms-eval (tasks/pope/utils.py): the whole answer is "yes" or "no"; "yes." is neither, and wrong."""
    found = answer.lower().strip()
    return judged(found == truth.lower().strip(), found if found in ("yes", "no") else None)


def pope_official(answer: str, truth: str) -> Judged:
    """POPE's own evaluate.py (github RUCAIBox/POPE): no where the first sentence has the word No, no or not, without
    commas; else yes, so that every answer counts as one of them."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    found = "no" if {"No", "no", "not"} & set(words) else "yes"
    return judged(found == truth.lower().strip(), found)


def hallusion_yes(answer: str, truth: str) -> Judged:
    """HallusionBench without a judge model, in lmms-eval (hb_aggregation_result_intern): yes where "yes" stands
    anywhere in the answer, in any case, else no."""
    found = "yes" if "yes" in answer.lower() else "no"
    return judged(found == truth, found)


def hallusion_word(answer: str, truth: str) -> Judged:
    """A stricter rule of this project: the first word that is yes or no counts; an answer with neither is wrong."""
    words = ("".join(letter if letter.isalnum() else " " for letter in answer.lower())).split()
    found = next((word for word in words if word in ("yes", "no")), None)
    return judged(found == truth, found)
