"""A reward for recipes to name."""


def even_tokens(completion_ids, **_):
    """The share of tokens with even numbers: quick to learn, whatever the model knows."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
