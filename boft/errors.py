"""The one error a person meets: a sentence that says what is wrong and what would fit."""


class BOFTError(ValueError):
    """Raised for every foreseeable mistake: a layer that does not fit, a broken file, an unknown key.

    The message is one sentence that names the file, layer or flag. Command-line programs print it without a traceback.
    """
