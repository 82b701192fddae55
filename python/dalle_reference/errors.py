"""The error that a person at the command line can act on."""


class UserError(RuntimeError):
    """Something in the data, a file or the command is not as wanted; the message alone says what to do."""
