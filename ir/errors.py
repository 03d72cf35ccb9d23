"""Errors of every layer. Each says what was expected, what came, where, and what to do."""


class GossamerError(Exception):
    """Base of all errors raised on purpose by gossamer."""


class InputError(GossamerError, ValueError):
    """An argument is wrong: rank, dtype, device, size or value."""

    def __init__(self, where: str, expected: str, got: object, fix: str = "") -> None:
        self.where, self.expected, self.got, self.fix = where, expected, got, fix
        super().__init__(f"{where}: expected {expected}; got {got}" + (f". {fix}" if fix else ""))


class TraceError(GossamerError):
    """A mask_mod or score_mod does something that cannot be captured; the message names the user's line."""


class ParseError(GossamerError, ValueError):
    """IR text is malformed. Carries the 1-based line and column."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        self.line, self.column = line, column
        super().__init__(f"line {line}, column {column}: {message}" if line else message)


class VerifyError(GossamerError):
    """An IR object breaks a rule of its level; the message names the rule and the offending node."""


class InterpretError(GossamerError):
    """A reference interpreter met what real code must not do: a read out of bounds, a division by zero."""


class UnsupportedError(GossamerError, NotImplementedError):
    """The request is meaningful but not built; the message names what is missing and what to use."""


class BackendError(GossamerError, RuntimeError):
    """A code generator or its compiler failed."""


class MissingDependencyError(GossamerError, ImportError):
    """An optional package is absent; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}; install it with: pip install 'gossamer[{extra}]'")


class ArtifactError(GossamerError, RuntimeError):
    """A saved kernel is corrupted, foreign, or was built for another machine."""


class CacheWarning(UserWarning):
    """The kernel cache had to discard, rebuild or skip an entry."""
