"""The one exception that means: the user can mend this."""


class InputError(Exception):
    """Bad input: one line that names the key or file, what was expected and the remedy.

    The command line prints it without a traceback and exits with status 2; any other exception is
    a defect and keeps its traceback.
    """
