"""Errors that a user can mend. A command line prints them as one line and exits with status 2."""


class UserError(Exception):
    """Bad input: the message says in one line what is wrong and where.

    Not a ValueError: command-line parsers catch those and write messages of their own.
    """


class MissingExtraError(ImportError):
    """A part of the package was imported without the extra that brings what it needs."""


class NonFiniteError(FloatingPointError):
    """Training met a NaN or an infinity; the message names the step, the pairs and the last good checkpoint."""


class PreemptedError(RuntimeError):
    """Training was asked to stop (SIGTERM) and saved; the message names the step, and the same command goes on from it."""


class UnfinishedError(RuntimeError):
    """Machines failed before the work was over; the message says of how much, and the same command goes on."""


class UnsupportedModelError(UserError):
    """A model does something for which no exact short form of the geometry is known; the message names the parameter."""
