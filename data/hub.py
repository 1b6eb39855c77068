"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations


def hub_problem(endpoint: str | None = None, timeout_s: float = 5.0) -> str | None:
    """Why the hub does not answer; None where it does, or where HF_HUB_OFFLINE says that its cache is to be used.

    endpoint: its address; by default HF_ENDPOINT.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    address = endpoint or constants.ENDPOINT
    try:
        urlopen(Request(address, method="HEAD"), timeout=timeout_s).close()
    except HTTPError:
        return None  # an answer
    except OSError as error:
        return f"{address} does not answer ({error})"
    return None


def require_hub(what: str, instead: str, timeout_s: float = 5.0) -> None:
    """Raise ConnectionError if the hub does not answer: its client would retry for a minute.

    what: the flag and its value; instead: what the flag also takes. With HF_HUB_OFFLINE the cache is used.
    """
    if problem := hub_problem(timeout_s=timeout_s):
        raise ConnectionError(
            f"{what}: {problem}. The flag also takes {instead}; what is in the hub's cache is used with "
            "HF_HUB_OFFLINE=1."
        )
