"""What can go wrong with an engine."""


class EngineError(RuntimeError):
    """An engine answered with an error, or is not in a state to be used."""


class EngineLost(EngineError):
    """An engine's process ended or its connection broke: whether it did what was asked is unknown."""


class NotStarted(EngineLost):
    """A server ended before it answered, or another process has its port; the end of its log is in the message."""


class StaleWeights(EngineError):
    """An engine holds other weights than those that it should have."""


class Garbage(EngineError):
    """An engine's answer cannot be one: no JSON, fields that are missing, log-probs that no probability has."""


class Aborted(EngineError):
    """An engine cut an answer short that nobody had given up."""
