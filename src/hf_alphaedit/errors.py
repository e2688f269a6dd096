"""What can go wrong, by name. Every message states the value at fault and the remedy."""


class AlphaEditError(Exception):
    """Base of all errors raised on purpose by this package."""


class RequestError(AlphaEditError, ValueError):
    """An edit request or an evaluation record can't be used as it stands."""


class ConfigError(AlphaEditError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class UnsupportedModelError(AlphaEditError, ValueError):
    """The model's structure, placement or storage doesn't allow a correct edit."""


class StatisticsError(AlphaEditError):
    """Second moments are missing, damaged, or belong to another model, tokenizer or corpus."""


class StateError(AlphaEditError):
    """Saved edits are damaged, foreign, or don't fit the weights in hand."""


class EditingError(AlphaEditError):
    """An edit failed while it was computed; the model is as it was before the call."""


class GateError(AlphaEditError):
    """An edit was made, measured, found wanting, and rolled back.

    Attributes:
        report: what was measured, an `EditReport`.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
