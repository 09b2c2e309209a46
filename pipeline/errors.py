"""The errors a user can meet: one root, one class per thing that can be wrong."""


class PipelineError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigError(PipelineError):
    """A flag, an argument or a request that is refused: what, where, what to do (exit code 2)."""


class ImageError(PipelineError):
    """One image can't be used; it becomes a `failed` row and the run goes on.

    Args:
        message: what is wrong with it.
        stage: where it failed.
        kind: a short stable name to group by; the class of the underlying error by default.
    """

    def __init__(self, message: str, *, stage: str = "decode", kind: str = "ImageError") -> None:
        super().__init__(message)
        self.stage = stage
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return _image_error, (str(self), self.stage, self.kind)


class ShardError(PipelineError):
    """One shard can't be opened or counted; it becomes one `failed` row and the run goes on."""


class StorageError(PipelineError):
    """The store answers no, after the retries: which URI, and what to check."""


class DamagedError(StorageError):
    """A file of an output can't be parsed."""


class BudgetError(PipelineError):
    """More images failed than `--max-failed-fraction` allows (exit code 3)."""


class CheckpointError(ConfigError):
    """Weights that are unknown, damaged or of another architecture."""


def _image_error(message: str, stage: str, kind: str) -> ImageError:
    """Rebuild an `ImageError` when it is unpickled in another process."""
    return ImageError(message, stage=stage, kind=kind)


_ADVICE = "\nFailed to apply UDF transform"  # what Ray Data (2.60) adds to the message of an error in a task


def own_error(error: BaseException | None) -> PipelineError | None:
    """The error of this package that a task on another process raised, out of its wrappings.

    Ray's wrapper is of both types, its message the remote traceback; `cause` is the error itself.
    """
    while error is not None:
        if isinstance(error, PipelineError) and not hasattr(error, "cause"):
            message, *others = error.args or ("",)
            error.args = (str(message).partition(_ADVICE)[0], *others)
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
