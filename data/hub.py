"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations


def require_hub(what: str, instead: str, timeout_s: float = 5.0) -> None:
    """Raise ConnectionError if the hub does not answer: its client would retry for a minute.

    what: the flag and its value; instead: what the flag also takes. With HF_HUB_OFFLINE the cache is used.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s).close()
    except HTTPError:
        return  # an answer
    except OSError as error:
        raise ConnectionError(
            f"{what}: {constants.ENDPOINT} does not answer ({error}). The flag also takes {instead}; what is in the "
            "hub's cache is used with HF_HUB_OFFLINE=1."
        ) from None
