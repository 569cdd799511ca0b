"""Why a client stops before the training is finished."""


class ClientError(Exception):
    """One plain sentence: what happened, why, what to do next."""


class TrainError(ClientError):
    """The data holder's own code failed; `traceback` shows where."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback
