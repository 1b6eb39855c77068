"""Tokens of a caption as COCO's evaluation has them: those of the Penn Treebank, in lower case, without punctuation.

COCO's scripts call Stanford's PTBTokenizer (CoreNLP 3.4.1, Java). This is a tokenizer of our own after the Treebank's
rules; docs/evaluation.md says how often it differs from Java's.
"""

import re

# What pycocoevalcap leaves out of the tokens. Java's brackets are lower case by then, and stay.
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_ABBREVIATIONS = """
    mr mrs ms dr prof st rev gen col capt lt sgt gov sen rep jr sr co corp inc ltd bros dept univ etc vs fig al
    jan feb mar apr jun jul aug sep sept oct nov dec mt ft ave blvd rd approx e.g i.e a.m p.m
""".split()  # noqa: SIM905
_TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_TWO_WORDS |= {"lemme": "lem me"}
_TOKEN = re.compile(
    rf"""
    (?P<web>(?:https?://|www\.)[^\s"<>]+[^\s"<>.,;:!?)] | \w[\w.+-]*@\w[\w-]*(?:\.\w+)+ | </?[a-z]+>)
    | (?P<abbreviation>(?:{"|".join(map(re.escape, _ABBREVIATIONS))})\.(?!\w) | (?:[a-z]\.){{2,}}(?:[a-z]\b)?
        | no\.(?=\s*\d) | \b[a-z]\.(?!\w))
    | (?P<number>(?>[-+]?\d+(?:[.,:]\d+)*(?:st|nd|rd|th|s)?|[-+]?\.\d+)(?!\w|[-/]\w))
    | (?P<word>(?:\b[odl]['’]|\bma['’](?=am\b))?[^\W_]+(?:[-./_][^\W_]+)*(?:(?<=n)['’]t\b)?)
    | (?P<suffix>['’](?:s|m|d|ll|re|ve)\b | ['’]n['’](?=\s|\w))
    | (?P<dots>\.{{2,}}|…) | (?P<dashes>-{{2,}}|[–—]) | (?P<marks>[?!]{{2,}})
    | (?P<quote>"|''|``|[“”„]) | (?P<single>['`‘’]) | (?P<unseen>[\u200b-\u200f\ufeff]) | (?P<other>\S)
    """,
    re.VERBOSE,
)


def tokens(caption: str) -> list[str]:
    """The tokens of a caption that count."""
    found: list[str] = []
    for match in _TOKEN.finditer(caption.lower()):
        kind, text = match.lastgroup, match.group()
        if kind == "word":
            found += _parts(text)
        elif kind == "suffix":
            found.append(text.replace("’", "'"))
        elif kind in ("other", "number", "web", "abbreviation", "marks"):
            found.append(_BRACKETS.get(text, text))
    return [one for one in found if one not in PUNCTUATION]


def _parts(word: str) -> list[str]:
    """A word, or the two that it is contracted from."""
    if word in _TWO_WORDS:
        return _TWO_WORDS[word].split()
    if len(word) > 3 and word[-3:] in ("n't", "n’t"):
        return [word[:-3], "n't"]
    return [word]
