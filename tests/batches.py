"""What a model reads, made by hand."""


def batch(inputs, targets, lookback):
    """A batch of causal language modelling; without targets the whole distribution is asked for."""
    fields = {"inputs": inputs, "targets": targets, "lookback": lookback}
    return {name: field for name, field in fields.items() if field is not None}
