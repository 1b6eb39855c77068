"""Values as nobody means them, in the places of a row."""

import random


def anything(rng: random.Random, depth: int = 0):
    """Any JSON value."""
    simple = [
        None,
        True,
        0,
        -1.5,
        "",
        "red",
        "<image>",
        "\ud800",
        "a.png",
        "https://x.y/z.png",
        10**30,
        float("nan"),
        "user",
    ]
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(simple)
    if rng.random() < 0.5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [
        "user",
        "assistant",
        "from",
        "value",
        "role",
        "content",
        "type",
        "text",
        "image",
        "bytes",
        "path",
        "label",
        "url",
    ]
    return {key: anything(rng, depth + 1) for key in rng.sample(keys, rng.randrange(4))}


def changed(value, rng: random.Random):
    """The value with anything in one of its places."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        made = dict(value) if isinstance(value, dict) else list(value)
        place = rng.choice(list(made) if isinstance(made, dict) else range(len(made)))
        made[place] = changed(made[place], rng)
        return made
    return anything(rng)
