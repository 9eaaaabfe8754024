"""The one exception that is written for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints it as one line, without a traceback.

    The text names what was given, what was expected and which key or file to change.
    """
