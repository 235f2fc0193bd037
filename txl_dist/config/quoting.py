"""Commands that are printed for a user to paste: both the shell and Hydra read back what was meant."""

import re
import shlex

# A path without these is read as it stands (overrides.py). The others mean something in Hydra's grammar.
GRAMMAR = re.compile(r"""^\Z|^[\s'"\[{~]|\s\Z|[\\,(]|\$\{|^null\Z|^\?+\Z""", re.IGNORECASE)


def quote_for_hydra(text: str) -> str:
    """Quote a text for Hydra's grammar. An interpolation, `${...}`, stays one."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def escape_interpolations(text: str) -> str:
    """Have OmegaConf read `${` as text."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quote_for_shell(word: str) -> str:
    """Quote a word for the shell, in double quotes where it holds single ones and that does."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def command_to_paste(program: str, *words: str, **values: object) -> str:
    """Return the shell command `program WORDS KEY=VALUE...`; a dot of a key is written `__`."""
    overrides = []
    for key, value in values.items():
        text = str(value)
        if GRAMMAR.search(text):
            text = quote_for_hydra(escape_interpolations(text))
        overrides.append(f"{key.replace('__', '.')}={text}")
    return " ".join([program, *map(quote_for_shell, [*words, *overrides])])
