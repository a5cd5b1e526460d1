"""The one error a person meets: a sentence that says what is wrong and what would fit."""

# A hostile file may have names and values of any length.
MOST_CHARACTERS = 2000


class BOFTError(ValueError):
    """Raised for every foreseeable mistake: a layer that does not fit, a broken file, an unknown key.

    The message is one sentence that names the file, layer or flag. Command-line programs print it without a traceback.
    It is made one line of printable characters, as names out of a broken file may hold any.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with line breaks, control characters and lone surrogates escaped, so that any terminal can show it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
